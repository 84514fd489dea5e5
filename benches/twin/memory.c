#include "twin.h"

uint64_t direct_map;

static void clear(void *at, size_t bytes)
{
#ifdef __x86_64__
	size_t words = bytes / 8;
	__asm__ volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(0ul) : "memory");
#else
	__builtin_memset(at, 0, bytes);
#endif
}

void *TWIN(zeroed_page)(struct pool *pool)
{
	char *page = pool->page;

	if (unlikely(page + PAGE_SIZE > pool->page_end))
		return NULL;
	pool->page += PAGE_SIZE;
	clear(page, PAGE_SIZE);
	return page;
}

void *TWIN(zeroed_object)(struct pool *pool, size_t size)
{
	char *object = pool->object;

	size = (size + 63) & ~63ul;
	if (unlikely(object + size > pool->object_end))
		return NULL;
	pool->object += size;
	clear(object, size);
	return object;
}

/* What stands for the current task in a lock that is held. */
static char task;

void TWIN(lock)(struct lock *lock)
{
	uintptr_t nobody = 0;

	while (unlikely(!__atomic_compare_exchange_n(&lock->owner, &nobody, (uintptr_t)&task, false, __ATOMIC_ACQUIRE,
						     __ATOMIC_RELAXED)))
		nobody = 0;
}

void TWIN(unlock)(struct lock *lock)
{
	uintptr_t me = (uintptr_t)&task;

	__atomic_compare_exchange_n(&lock->owner, &me, 0, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

unsigned long TWIN(next_bit)(const unsigned long *map, unsigned long size, unsigned long from)
{
	unsigned long at = from / 64, word, bit;

	if (unlikely(from >= size))
		return size;
	word = map[at] & (~0ul << from % 64);
	while (!word) {
		at++;
		if (at * 64 >= size)
			return size;
		word = map[at];
	}
	bit = at * 64 + __builtin_ctzl(word);
	return bit < size ? bit : size;
}
