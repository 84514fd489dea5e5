/* As one file, so that a compiler can see through every call. */
#include "memory.c"
#include "xa.c"
#include "v1.c"
#include "v4.c"
#include "pages.c"
