// How many threads the forward passes of one thread may use. A model is loaded, tested and warmed
// with few while others answer requests with all.
#ifndef PYRAMID_MODEL_THREAD_LIMIT_H_
#define PYRAMID_MODEL_THREAD_LIMIT_H_

namespace pyramid {

// Holds for the thread that makes it, as long as it lives; the one inside another counts. With a
// limit of 1 a pass runs on its caller's thread alone and leaves the team (thread_team.h) to
// others.
class ThreadLimit {
 public:
  explicit ThreadLimit(int threads) : before_(current_) { current_ = threads; }
  ~ThreadLimit() { current_ = before_; }
  ThreadLimit(const ThreadLimit&) = delete;
  ThreadLimit& operator=(const ThreadLimit&) = delete;

  // `threads`, or the calling thread's limit if that is less.
  static int Of(int threads) { return current_ > 0 && current_ < threads ? current_ : threads; }

 private:
  inline static thread_local int current_ = 0;  // 0: none
  const int before_;
};

}  // namespace pyramid

#endif  // PYRAMID_MODEL_THREAD_LIMIT_H_
