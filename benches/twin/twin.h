/*
 * A stand-in for the kernel's bookkeeping of preserved memory: the algorithm of kernel/kexec_handover.c (6.18, "v1") and
 * of kernel/liveupdate/kexec_handover.c (7.2, "v4") in userspace, written for these benches from what those files do.
 * It is not the kernel's code. What it leaves out makes it faster than the kernel: memblock_reserve() of every folio on
 * take-over, compound pages on restore, debug checks. See benches/README.md for how near its instruction counts are.
 *
 * It is compiled twice, under two prefixes: with the kernel's own flags, a file at a time as the kernel is, and as one
 * file with -O3 -march=native.
 */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TWIN_JOIN(prefix, name) prefix##name
#define TWIN_NAME(prefix, name) TWIN_JOIN(prefix, name)
#define TWIN(name) TWIN_NAME(TWIN_PREFIX, name)

#define PAGE_SHIFT 12
#define PAGE_SIZE 4096ul
#define PAGE_BITS (8 * PAGE_SIZE)

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/*
 * Memory: pages and small objects, each from a mapping of huge pages that the harness has touched, because the kernel's
 * own memory is mapped so and costs no faults. `phys = virt - offset`, as in the kernel's direct map.
 */
struct pool {
	char *page, *page_end;
	char *object, *object_end;
};

extern uint64_t TWIN(direct_map);
#define direct_map TWIN(direct_map)

static inline uint64_t virt_to_phys(const void *p)
{
	return (uint64_t)(uintptr_t)p - direct_map;
}

static inline void *phys_to_virt(uint64_t phys)
{
	return (void *)(uintptr_t)(phys + direct_map);
}

void *TWIN(zeroed_page)(struct pool *);
void *TWIN(zeroed_object)(struct pool *, size_t);

/* A lock without contention: one atomic operation to take it, one to give it back. */
struct lock {
	uintptr_t owner;
};

void TWIN(lock)(struct lock *);
void TWIN(unlock)(struct lock *);

/* xa.c: a sparse array as a tree of 64-slot nodes, walked from its head by every call (lib/xarray.c). */
struct xa {
	struct lock lock;
	unsigned int flags;
	void *head;
};

void *TWIN(xa_load)(struct xa *, unsigned long index);
bool TWIN(xa_insert)(struct pool *, struct xa *, unsigned long index, void *entry);
/* The first entry at or after *index, whose index is put there; NULL if absent. */
void *TWIN(xa_find)(struct xa *, unsigned long *index);
void *TWIN(xa_find_after)(struct xa *, unsigned long *index);

/* Bits. set and clear are atomic, the __ ones are not; both go by instructions on memory, as the kernel's do. */
static inline void set_bit(unsigned long bit, unsigned long *map)
{
#ifdef __x86_64__
	__asm__ volatile("lock btsq %1, %0" : "+m"(*map) : "r"(bit) : "memory", "cc");
#else
	__atomic_fetch_or(map + bit / 64, 1ul << bit % 64, __ATOMIC_RELAXED);
#endif
}

static inline void clear_bit(unsigned long bit, unsigned long *map)
{
#ifdef __x86_64__
	__asm__ volatile("lock btrq %1, %0" : "+m"(*map) : "r"(bit) : "memory", "cc");
#else
	__atomic_fetch_and(map + bit / 64, ~(1ul << bit % 64), __ATOMIC_RELAXED);
#endif
}

static inline void __set_bit(unsigned long bit, unsigned long *map)
{
#ifdef __x86_64__
	__asm__ volatile("btsq %1, %0" : "+m"(*map) : "r"(bit) : "memory", "cc");
#else
	map[bit / 64] |= 1ul << bit % 64;
#endif
}

static inline void __clear_bit(unsigned long bit, unsigned long *map)
{
#ifdef __x86_64__
	__asm__ volatile("btrq %1, %0" : "+m"(*map) : "r"(bit) : "memory", "cc");
#else
	map[bit / 64] &= ~(1ul << bit % 64);
#endif
}

/* The first bit set at or after `from`, or `size`. */
unsigned long TWIN(next_bit)(const unsigned long *map, unsigned long size, unsigned long from);

/* The greedy split of a page range. */
static inline unsigned int piece(uint64_t pfn, uint64_t end)
{
	unsigned int align = pfn ? __builtin_ctzl(pfn) : 64;
	unsigned int room = 63 - __builtin_clzl(end - pfn);
	return align < room ? align : room;
}

/* v1.c */
struct v1 {
	struct xa orders;
	struct pool *pool;
};

void TWIN(v1_init)(struct v1 *, struct pool *);
int TWIN(v1_preserve)(struct v1 *, uint64_t pfn, unsigned int order);
void TWIN(v1_unpreserve)(struct v1 *, uint64_t pfn, uint64_t end);
int TWIN(v1_preserve_each)(struct v1 *, const uint64_t *pfns, const uint8_t *orders, size_t n);
void TWIN(v1_unpreserve_each)(struct v1 *, const uint64_t *pfns, const uint8_t *orders, size_t n);
/* Folios as pfn << 6 | order. */
size_t TWIN(v1_iterate)(struct v1 *, uint64_t *out);
/* The physical address of the first chunk; 0 without one. */
uint64_t TWIN(v1_serialize)(struct v1 *);

/* v4.c */
struct v4 {
	struct lock lock;
	uint64_t *root;
	struct pool *pool;
};

void TWIN(v4_init)(struct v4 *, struct pool *);
int TWIN(v4_preserve)(struct v4 *, uint64_t pfn, unsigned int order);
void TWIN(v4_unpreserve)(struct v4 *, uint64_t pfn, uint64_t end);
int TWIN(v4_preserve_each)(struct v4 *, const uint64_t *pfns, const uint8_t *orders, size_t n);
void TWIN(v4_unpreserve_each)(struct v4 *, const uint64_t *pfns, const uint8_t *orders, size_t n);
size_t TWIN(v4_iterate)(struct v4 *, uint64_t *out);

/*
 * pages.c: what the next kernel does. A page's structure here is the two words of it that are used; the kernel's has 64
 * bytes; these two are in one cache line.
 */
struct page {
	uint32_t private;
	uint32_t refcount;
};

struct machine {
	struct page *pages;
	uint64_t nr_pages;
	/* Bits of sections of 128 MiB that are online. */
	unsigned long *online;
	long managed, total;
};

size_t TWIN(v1_take_over)(struct machine *, uint64_t chunk);
size_t TWIN(v4_take_over)(struct machine *, struct v4 *);
int TWIN(restore)(struct machine *, uint64_t phys);
size_t TWIN(restore_each)(struct machine *, const uint64_t *pfns, size_t n);

#define PAGE_MARK 0x4b484f00u

static inline void mark(struct machine *m, uint64_t pfn, unsigned int order)
{
	m->pages[pfn].private = PAGE_MARK | order;
}

/* The walk of v4, for iterating and taking over. */
typedef int (*visit)(void *context, uint64_t phys, unsigned int order);
int TWIN(v4_walk)(struct v4 *, visit, void *context);
