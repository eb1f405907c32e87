// Exported by the library of emulated kernels, for the tests.
#include "emulate.h"

// The order in which threads and blocks run: 0 ascending, 1 descending, others shuffled.
extern "C" __attribute__((visibility("default"))) void gflowgr_emulate_schedule(int order) {
  emulate::schedule = order;
}
