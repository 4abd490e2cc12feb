// Whether a sanitizer that keeps shadows of memory (AddressSanitizer, ThreadSanitizer) is compiled
// in: measured resident memory then says nothing about the program's own.
#ifndef PYRAMID_TESTS_TESTING_SANITIZED_H_
#define PYRAMID_TESTS_TESTING_SANITIZED_H_

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define PYRAMID_SANITIZED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define PYRAMID_SANITIZED
#endif

namespace pyramid::testing {

#ifdef PYRAMID_SANITIZED
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace pyramid::testing

#endif  // PYRAMID_TESTS_TESTING_SANITIZED_H_
