/* Taking the marker of a head page away, once. */
#include "twin.h"

#define ORDER_MASK 0xffu
#define SECTION_SHIFT 15

static inline struct page *online_page(struct machine *m, uint64_t pfn)
{
	unsigned long section = pfn >> SECTION_SHIFT;

	if (unlikely(pfn >= m->nr_pages || !(m->online[section / 64] >> section % 64 & 1)))
		return NULL;
	return &m->pages[pfn];
}

int TWIN(restore)(struct machine *m, uint64_t phys)
{
	struct page *page = online_page(m, phys >> PAGE_SHIFT);
	unsigned int order;

	if (!page)
		return -22;
	order = page->private & ORDER_MASK;
	if (unlikely((page->private & ~ORDER_MASK) != PAGE_MARK || order > 10))
		return -22;
	page->private = 0;
	__atomic_store_n(&page->refcount, 1, __ATOMIC_RELAXED);
	for (unsigned long i = 1; i < 1ul << order; i++)
		__atomic_store_n(&page[i].refcount, 0, __ATOMIC_RELAXED);
	/* Pages of the zone and of the machine, both counted atomically. */
	__atomic_fetch_add(&m->managed, 1l << order, __ATOMIC_RELAXED);
	__atomic_fetch_add(&m->total, 1l << order, __ATOMIC_RELAXED);
	return 0;
}

size_t TWIN(restore_each)(struct machine *m, const uint64_t *pfns, size_t n)
{
	size_t restored = 0;

	for (size_t i = 0; i < n; i++)
		restored += !TWIN(restore)(m, pfns[i] << PAGE_SHIFT);
	return restored;
}
