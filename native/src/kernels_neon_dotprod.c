/* kernels_neon.c with the dot-product instructions; compiled with their flag. */
#define DOTPROD
#include "kernels_neon.c"
