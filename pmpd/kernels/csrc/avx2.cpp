#include "bitplane.h"
#ifdef PMPD_X86
const Level avx2_level = {"avx2", nullptr, nullptr, nullptr, nullptr};
#endif
