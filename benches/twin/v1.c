/* kho-v1 with bitmaps of a page: orders -> bitmaps by index -> bits; written out as a list of chunks (abi.md section 3). */
#include "twin.h"

struct bitmap {
	unsigned long words[PAGE_SIZE / 8];
};

struct order {
	struct xa bitmaps;
};

struct chunk {
	uint64_t next;
	uint32_t order, used;
	struct {
		uint64_t start, bitmap;
	} entries[(PAGE_SIZE - 16) / 16];
};

_Static_assert(sizeof(struct chunk) == PAGE_SIZE, "a chunk is a page");

void TWIN(v1_init)(struct v1 *t, struct pool *pool)
{
	*t = (struct v1){ .pool = pool };
}

static inline void *load_or_make(struct pool *pool, struct xa *xa, unsigned long index, size_t size)
{
	void *entry = TWIN(xa_load)(xa, index);

	if (entry)
		return entry;
	entry = size == PAGE_SIZE ? TWIN(zeroed_page)(pool) : TWIN(zeroed_object)(pool, size);
	if (!entry || !TWIN(xa_insert)(pool, xa, index, entry))
		return NULL;
	return entry;
}

int TWIN(v1_preserve)(struct v1 *t, uint64_t pfn, unsigned int order)
{
	const uint64_t folio = pfn >> order;
	struct bitmap *bitmap;
	struct order *o;

	o = load_or_make(t->pool, &t->orders, order, sizeof(*o));
	if (!o)
		return -12;
	bitmap = load_or_make(t->pool, &o->bitmaps, folio / PAGE_BITS, sizeof(*bitmap));
	if (!bitmap)
		return -12;
	set_bit(folio % PAGE_BITS, bitmap->words);
	return 0;
}

void TWIN(v1_unpreserve)(struct v1 *t, uint64_t pfn, uint64_t end)
{
	struct bitmap *bitmap;
	struct order *o;

	while (pfn < end) {
		const unsigned int order = piece(pfn, end);
		const uint64_t folio = pfn >> order;

		pfn += 1ul << order;
		o = TWIN(xa_load)(&t->orders, order);
		if (!o)
			continue;
		bitmap = TWIN(xa_load)(&o->bitmaps, folio / PAGE_BITS);
		if (!bitmap)
			continue;
		clear_bit(folio % PAGE_BITS, bitmap->words);
	}
}

int TWIN(v1_preserve_each)(struct v1 *t, const uint64_t *pfns, const uint8_t *orders, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		int err = TWIN(v1_preserve)(t, pfns[i], orders ? orders[i] : 0);

		if (err)
			return err;
	}
	return 0;
}

void TWIN(v1_unpreserve_each)(struct v1 *t, const uint64_t *pfns, const uint8_t *orders, size_t n)
{
	for (size_t i = 0; i < n; i++)
		TWIN(v1_unpreserve)(t, pfns[i], pfns[i] + (1ul << (orders ? orders[i] : 0)));
}

size_t TWIN(v1_iterate)(struct v1 *t, uint64_t *out)
{
	unsigned long order = 0, index, bit;
	struct bitmap *bitmap;
	struct order *o;
	size_t n = 0;

	for (o = TWIN(xa_find)(&t->orders, &order); o; o = TWIN(xa_find_after)(&t->orders, &order)) {
		index = 0;
		for (bitmap = TWIN(xa_find)(&o->bitmaps, &index); bitmap;
		     bitmap = TWIN(xa_find_after)(&o->bitmaps, &index)) {
			for (bit = TWIN(next_bit)(bitmap->words, PAGE_BITS, 0); bit < PAGE_BITS;
			     bit = TWIN(next_bit)(bitmap->words, PAGE_BITS, bit + 1))
				out[n++] = (index * PAGE_BITS + bit) << order << 6 | order;
		}
	}
	return n;
}

static struct chunk *new_chunk(struct v1 *t, struct chunk *last, unsigned long order)
{
	struct chunk *chunk = TWIN(zeroed_page)(t->pool);

	if (!chunk)
		return NULL;
	chunk->order = order;
	if (last)
		last->next = virt_to_phys(chunk);
	return chunk;
}

uint64_t TWIN(v1_serialize)(struct v1 *t)
{
	struct chunk *first = NULL, *chunk = NULL;
	unsigned long order = 0, index;
	struct bitmap *bitmap;
	struct order *o;

	for (o = TWIN(xa_find)(&t->orders, &order); o; o = TWIN(xa_find_after)(&t->orders, &order)) {
		chunk = new_chunk(t, chunk, order);
		if (!chunk)
			return 0;
		if (!first)
			first = chunk;
		index = 0;
		for (bitmap = TWIN(xa_find)(&o->bitmaps, &index); bitmap;
		     bitmap = TWIN(xa_find_after)(&o->bitmaps, &index)) {
			if (chunk->used == sizeof(chunk->entries) / sizeof(chunk->entries[0])) {
				chunk = new_chunk(t, chunk, order);
				if (!chunk)
					return 0;
			}
			chunk->entries[chunk->used].start = index * PAGE_BITS << (order + PAGE_SHIFT);
			chunk->entries[chunk->used].bitmap = virt_to_phys(bitmap);
			chunk->used++;
		}
	}
	return first ? virt_to_phys(first) : 0;
}

size_t TWIN(v1_take_over)(struct machine *m, uint64_t phys)
{
	const struct bitmap *bitmap;
	const struct chunk *chunk;
	size_t n = 0;

	for (; phys; phys = chunk->next) {
		chunk = phys_to_virt(phys);
		for (uint32_t i = 0; i < chunk->used; i++) {
			bitmap = phys_to_virt(chunk->entries[i].bitmap);
			for (unsigned long bit = TWIN(next_bit)(bitmap->words, PAGE_BITS, 0); bit < PAGE_BITS;
			     bit = TWIN(next_bit)(bitmap->words, PAGE_BITS, bit + 1)) {
				mark(m, (chunk->entries[i].start >> PAGE_SHIFT) + (bit << chunk->order), chunk->order);
				n++;
			}
		}
	}
	return n;
}
