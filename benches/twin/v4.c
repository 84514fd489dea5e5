/*
 * kho-v4: one tree of pages of fixed depth, valid all the time (abi.md section 4). Every call takes the tree's lock,
 * walks from the root, and changes a bit of a leaf; tables hold physical addresses.
 */
#include "twin.h"

#define DEPTH 6
#define TABLE_BITS 9
#define LEAF_BITS 15
#define ORDER_0_BIT (64 - PAGE_SHIFT)

static unsigned long key_of(uint64_t phys, unsigned int order)
{
	return 1ul << (ORDER_0_BIT - order) | phys >> (PAGE_SHIFT + order);
}

static uint64_t phys_of(unsigned long key, unsigned int *order)
{
	*order = ORDER_0_BIT - (63 - __builtin_clzl(key));
	/* The bit that tells the order is shifted out. */
	return key << (PAGE_SHIFT + *order);
}

static unsigned long table_slot(unsigned long key, unsigned int level)
{
	int shift = (level - 1) * TABLE_BITS + LEAF_BITS;

	return (key >> shift) % (1 << TABLE_BITS);
}

void TWIN(v4_init)(struct v4 *t, struct pool *pool)
{
	*t = (struct v4){ .pool = pool, .root = TWIN(zeroed_page)(pool) };
}

int TWIN(v4_preserve)(struct v4 *t, uint64_t pfn, unsigned int order)
{
	unsigned long key = key_of(pfn << PAGE_SHIFT, order);
	/* What was made on the way, to be taken back if memory ends. */
	uint64_t *made[DEPTH] = { 0 };
	uint64_t *node = t->root, *anchor = NULL;
	int err = 0;

	if (unlikely(!t->root))
		return -22;
	TWIN(lock)(&t->lock);
	for (unsigned int level = DEPTH - 1; level > 0; level--) {
		unsigned long slot = table_slot(key, level);

		if (!node[slot]) {
			made[level] = TWIN(zeroed_page)(t->pool);
			if (!made[level]) {
				err = -12;
				goto out;
			}
			node[slot] = virt_to_phys(made[level]);
			if (!anchor)
				anchor = &node[slot];
		}
		node = phys_to_virt(node[slot]);
	}
	__set_bit(key % (1 << LEAF_BITS), (unsigned long *)node);
out:
	if (unlikely(err) && anchor)
		*anchor = 0;
	TWIN(unlock)(&t->lock);
	return err;
}

static __attribute__((noinline)) void forget(struct v4 *t, uint64_t pfn, unsigned int order)
{
	unsigned long key = key_of(pfn << PAGE_SHIFT, order);
	uint64_t *node = t->root;

	if (unlikely(!t->root))
		return;
	TWIN(lock)(&t->lock);
	for (unsigned int level = DEPTH - 1; level > 0; level--) {
		unsigned long slot = table_slot(key, level);

		if (unlikely(!node[slot]))
			goto out;
		node = phys_to_virt(node[slot]);
	}
	__clear_bit(key % (1 << LEAF_BITS), (unsigned long *)node);
out:
	TWIN(unlock)(&t->lock);
}

void TWIN(v4_unpreserve)(struct v4 *t, uint64_t pfn, uint64_t end)
{
	while (pfn < end) {
		unsigned int order = piece(pfn, end);

		forget(t, pfn, order);
		pfn += 1ul << order;
	}
}

int TWIN(v4_preserve_each)(struct v4 *t, const uint64_t *pfns, const uint8_t *orders, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		int err = TWIN(v4_preserve)(t, pfns[i], orders ? orders[i] : 0);

		if (err)
			return err;
	}
	return 0;
}

void TWIN(v4_unpreserve_each)(struct v4 *t, const uint64_t *pfns, const uint8_t *orders, size_t n)
{
	for (size_t i = 0; i < n; i++)
		TWIN(v4_unpreserve)(t, pfns[i], pfns[i] + (1ul << (orders ? orders[i] : 0)));
}

static int walk(const uint64_t *table, unsigned int level, unsigned long start, visit visit, void *context)
{
	unsigned int shift = (level - 1) * TABLE_BITS + LEAF_BITS, order;
	uint64_t phys;
	int err;

	for (unsigned long i = 0; i < 1 << TABLE_BITS; i++) {
		unsigned long key = start | i << shift;
		void *node;

		if (!table[i])
			continue;
		node = phys_to_virt(table[i]);
		if (level > 1) {
			err = walk(node, level - 1, key, visit, context);
			if (err)
				return err;
			continue;
		}
		for (unsigned long bit = TWIN(next_bit)(node, PAGE_BITS, 0); bit < PAGE_BITS;
		     bit = TWIN(next_bit)(node, PAGE_BITS, bit + 1)) {
			phys = phys_of(key | bit, &order);
			err = visit(context, phys, order);
			if (err)
				return err;
		}
	}
	return 0;
}

int TWIN(v4_walk)(struct v4 *t, visit visit, void *context)
{
	int err;

	TWIN(lock)(&t->lock);
	err = walk(t->root, DEPTH - 1, 0, visit, context);
	TWIN(unlock)(&t->lock);
	return err;
}

struct array {
	uint64_t *out;
	size_t n;
};

static int append(void *context, uint64_t phys, unsigned int order)
{
	struct array *array = context;

	array->out[array->n++] = phys >> PAGE_SHIFT << 6 | order;
	return 0;
}

size_t TWIN(v4_iterate)(struct v4 *t, uint64_t *out)
{
	struct array array = { .out = out };

	TWIN(v4_walk)(t, append, &array);
	return array.n;
}

struct marked {
	struct machine *machine;
	size_t n;
};

static int mark_one(void *context, uint64_t phys, unsigned int order)
{
	struct marked *marked = context;

	mark(marked->machine, phys >> PAGE_SHIFT, order);
	marked->n++;
	return 0;
}

size_t TWIN(v4_take_over)(struct machine *m, struct v4 *t)
{
	struct marked marked = { .machine = m };

	TWIN(v4_walk)(t, mark_one, &marked);
	return marked.n;
}
