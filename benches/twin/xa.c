/*
 * A slot holds NULL, an entry, or something of the array's own, told by its two lowest bits being 10: a node, a marker
 * that a reader must start again, or (below 256) a reference to a slot of the same node, for entries that take several.
 * Every call begins at the head with a cursor on the stack, and asks of every slot what it holds.
 */
#include "twin.h"

#define SLOTS 64u
#define SLOT_BITS 6u

struct node {
	uint8_t shift, offset, count, values;
	struct node *parent;
	struct xa *array;
	void *list[2];
	void *slots[SLOTS];
	unsigned long marks[3];
};

/* Where a cursor stands: a node, NULL (the head itself), or one of these. */
#define NOWHERE ((struct node *)1ul)
#define ANEW ((struct node *)3ul)

#define RETRY ((void *)(256ul << 2 | 2))
#define ZERO ((void *)(257ul << 2 | 2))

struct cursor {
	struct xa *xa;
	unsigned long index;
	uint8_t shift, siblings, offset, pad;
	struct node *node;
	struct node *spare;
	void (*update)(struct node *);
	void *lru;
};

#define CURSOR(name, array, at) struct cursor name = { .xa = (array), .index = (at), .node = ANEW }

static inline bool internal(const void *entry)
{
	return ((uintptr_t)entry & 3) == 2;
}

static inline bool is_node(const void *entry)
{
	return internal(entry) && (uintptr_t)entry > 4096;
}

static inline struct node *to_node(const void *entry)
{
	return (struct node *)((uintptr_t)entry - 2);
}

static inline void *of_node(const struct node *node)
{
	return (void *)((uintptr_t)node | 2);
}

static inline bool is_sibling(const void *entry)
{
	return internal(entry) && (uintptr_t)entry < (SLOTS << 2 | 2);
}

static inline void *read_slot(void **slot)
{
	return __atomic_load_n(slot, __ATOMIC_RELAXED);
}

static inline bool on_node(const struct cursor *c)
{
	return ((uintptr_t)c->node & 3) == 0;
}

static inline bool failed(const struct cursor *c)
{
	return internal(c->node) && (uintptr_t)c->node >= (uintptr_t)-4095 << 2;
}

static inline unsigned int slot_of(unsigned long index, const struct node *node)
{
	return (index >> node->shift) % SLOTS;
}

/* The head, if the index can be below it. */
static void *begin(struct cursor *c)
{
	void *entry;

	if (on_node(c))
		return read_slot(c->node ? &c->node->slots[c->offset] : &c->xa->head);
	if (failed(c))
		return NULL;
	entry = read_slot(&c->xa->head);
	if (is_node(entry) ? c->index >> to_node(entry)->shift >= SLOTS : c->index != 0) {
		c->node = NOWHERE;
		return NULL;
	}
	c->node = NULL;
	return entry;
}

static inline void *descend(struct cursor *c, struct node *node)
{
	unsigned int offset = slot_of(c->index, node);
	void *entry = read_slot(&node->slots[offset]);

	c->node = node;
	if (is_sibling(entry)) {
		offset = (uintptr_t)entry >> 2;
		entry = read_slot(&node->slots[offset]);
	}
	c->offset = offset;
	return entry;
}

static void *load(struct cursor *c)
{
	void *entry = begin(c);

	while (is_node(entry)) {
		struct node *node = to_node(entry);

		if (c->shift > node->shift)
			break;
		entry = descend(c, node);
		if (!node->shift)
			break;
	}
	return entry;
}

/* Whether what was read is a marker of a change under way. */
static inline bool again(struct cursor *c, const void *entry)
{
	if (entry == ZERO)
		return true;
	if (entry != RETRY)
		return false;
	c->node = ANEW;
	return true;
}

/* Readers take no lock; leaving and entering such a section is a matter for the compiler alone. */
static inline void read_section(void)
{
	__asm__ volatile("" ::: "memory");
}

void *TWIN(xa_load)(struct xa *xa, unsigned long index)
{
	CURSOR(c, xa, index);
	void *entry;

	read_section();
	do {
		entry = load(&c);
		if (entry == ZERO)
			entry = NULL;
	} while (again(&c, entry));
	read_section();
	return entry;
}

static struct node *new_node(struct pool *pool, struct xa *xa, struct node *parent, unsigned int offset,
			     unsigned int shift)
{
	struct node *node = TWIN(zeroed_object)(pool, sizeof(*node));

	if (!node)
		return NULL;
	node->shift = shift;
	node->offset = offset;
	node->parent = parent;
	node->array = xa;
	if (parent)
		parent->count++;
	return node;
}

bool TWIN(xa_insert)(struct pool *pool, struct xa *xa, unsigned long index, void *entry)
{
	struct node *node, *child;
	bool done = false;
	void **slot;

	TWIN(lock)(&xa->lock);
	/* Higher until the index fits below the head. */
	while (is_node(xa->head) ? index >> to_node(xa->head)->shift >= SLOTS : index > 0 || xa->head) {
		unsigned int shift = is_node(xa->head) ? to_node(xa->head)->shift + SLOT_BITS : 0;

		while (!xa->head && index >> shift >= SLOTS)
			shift += SLOT_BITS;
		node = new_node(pool, xa, NULL, 0, shift);
		if (!node)
			goto out;
		if (xa->head) {
			node->slots[0] = xa->head;
			node->count = 1;
			if (is_node(xa->head))
				to_node(xa->head)->parent = node;
		}
		__atomic_store_n(&xa->head, of_node(node), __ATOMIC_RELEASE);
	}
	slot = &xa->head;
	node = NULL;
	while (is_node(*slot) || (node && node->shift)) {
		if (!*slot) {
			child = new_node(pool, xa, node, slot - node->slots, node->shift - SLOT_BITS);
			if (!child)
				goto out;
			__atomic_store_n(slot, of_node(child), __ATOMIC_RELEASE);
		}
		node = to_node(*slot);
		slot = &node->slots[slot_of(index, node)];
	}
	if (node)
		node->count++;
	__atomic_store_n(slot, entry, __ATOMIC_RELEASE);
	done = true;
out:
	TWIN(unlock)(&xa->lock);
	return done;
}

static void next_offset(struct cursor *c)
{
	unsigned int shift = c->node->shift;

	c->offset++;
	c->index = (c->index & ~(SLOTS - 1ul) << shift) + ((unsigned long)c->offset << shift);
}

/* The first entry from the cursor's index on. */
static void *find(struct cursor *c)
{
	void *entry = load(c);

	if (entry || !c->node || !on_node(c))
		return entry;
	next_offset(c);
	while (c->node) {
		if (c->offset == SLOTS) {
			c->offset = c->node->offset + 1;
			c->node = c->node->parent;
			continue;
		}
		entry = read_slot(&c->node->slots[c->offset]);
		if (is_node(entry)) {
			c->node = to_node(entry);
			c->offset = 0;
			continue;
		}
		if (entry && !is_sibling(entry))
			return entry;
		next_offset(c);
	}
	c->node = NOWHERE;
	return NULL;
}

static void *find_from(struct xa *xa, unsigned long from, unsigned long *index)
{
	CURSOR(c, xa, from);
	void *entry;

	read_section();
	do {
		entry = find(&c);
	} while (again(&c, entry));
	read_section();
	if (entry)
		*index = c.index;
	return entry;
}

void *TWIN(xa_find)(struct xa *xa, unsigned long *index)
{
	return find_from(xa, *index, index);
}

void *TWIN(xa_find_after)(struct xa *xa, unsigned long *index)
{
	if (*index == ~0ul)
		return NULL;
	return find_from(xa, *index + 1, index);
}
