#include "core/huge_pages.h"

#include <cstdint>

#include "core/check.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sf {

void advise_huge_pages(const TensorView& view) {
  expect("advise_huge_pages", "tensor", view).contiguous();
#if defined(__linux__)
  if (view.device != Device{}) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(view.nbytes())) / page * page;
  // A kernel without huge pages refuses, which leaves everything as it was.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace sf
