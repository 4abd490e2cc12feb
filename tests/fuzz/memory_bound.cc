// Holds a fuzz target to its memory: while it works on an input, at most 2x the input's size plus
// 64 MiB of heap may be alive beyond what was before, all threads together. Breaking it ends the
// program inside the allocation, so that the trace shows who asked.
//
// The linker puts this before every target (-Wl,--wrap=LLVMFuzzerTestOneInput). Under a sanitizer
// its allocator tells what is taken and given back; otherwise malloc and its family are replaced
// here by glibc's own with a count, which also sees the C libraries. Reserved bytes count, touched
// or not.
#include <malloc.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "tests/fuzz/fuzz_target.h"
#include "tests/testing/sanitized.h"

namespace {

constexpr int64_t kBeside = int64_t{64} << 20;

std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> most_allowed{INT64_MAX};

void Taken(size_t bytes) {
  const int64_t live =
      live_bytes.fetch_add(static_cast<int64_t>(bytes)) + static_cast<int64_t>(bytes);
  if (live <= most_allowed.load(std::memory_order_relaxed)) return;
  const int64_t allowed = most_allowed.exchange(INT64_MAX);  // writing and aborting may allocate
  char text[160];
  const int length =
      std::snprintf(text, sizeof text,
                    "fuzz: %lld bytes of heap over 2x the input's size plus 64 MiB; the last "
                    "allocation has %zu\n",
                    static_cast<long long>(live - allowed), bytes);
  if (write(STDERR_FILENO, text, static_cast<size_t>(length)) < 0) _exit(1);
  std::abort();
}

void GivenBack(size_t bytes) { live_bytes.fetch_sub(static_cast<int64_t>(bytes)); }

}  // namespace

#ifdef PYRAMID_SANITIZED

extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*taken)(const volatile void*,
                                                                       size_t),
                                                         void (*given_back)(const volatile void*));
extern "C" size_t __sanitizer_get_allocated_size(const volatile void* block);

namespace {

[[maybe_unused]] const int installed = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, size_t bytes) { Taken(bytes); },
    [](const volatile void* block) { GivenBack(__sanitizer_get_allocated_size(block)); });

}  // namespace

#else

extern "C" {

void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* block, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void* block);

static void* Counted(void* block) {
  if (block != nullptr) Taken(malloc_usable_size(block));
  return block;
}

void* malloc(size_t bytes) { return Counted(__libc_malloc(bytes)); }
void* calloc(size_t count, size_t bytes) { return Counted(__libc_calloc(count, bytes)); }
void* memalign(size_t alignment, size_t bytes) {
  return Counted(__libc_memalign(alignment, bytes));
}
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** block, size_t alignment, size_t bytes) {
  void* made = memalign(alignment, bytes);
  if (made == nullptr) return ENOMEM;
  *block = made;
  return 0;
}
void* realloc(void* block, size_t bytes) {
  const size_t before = block == nullptr ? 0 : malloc_usable_size(block);
  void* made = __libc_realloc(block, bytes);
  if (made != nullptr || bytes == 0) GivenBack(before);
  return Counted(made);
}
void free(void* block) {
  if (block != nullptr) GivenBack(malloc_usable_size(block));
  __libc_free(block);
}

}  // extern "C"

#endif

extern "C" int __real_LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

extern "C" int __wrap_LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  most_allowed = live_bytes + 2 * static_cast<int64_t>(size) + kBeside;
  const int result = __real_LLVMFuzzerTestOneInput(data, size);
  most_allowed = INT64_MAX;
  return result;
}
