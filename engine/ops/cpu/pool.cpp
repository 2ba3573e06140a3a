// A pool of threads for loops of some tens of microseconds.
//
// A decoded token takes hundreds of such loops, one after the other. So a thread that has run out of work looks for
// more for a little while before it sleeps, and the caller never waits for a thread that has not woken: it takes the
// pieces itself. Where the pieces of a loop lie in memory one after the other, each thread begins at a place of its own
// and goes on from there, as prefetchers expect, and helps the others when it has come to its end.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define WHET_PAUSE() _mm_pause()
#else
#define WHET_PAUSE() std::this_thread::yield()
#endif

// A test puts delays here, so that threads meet where they seldom do (tests/unit/test_cpu_pool.py).
#ifndef WHET_DELAY
#define WHET_DELAY()
#endif

namespace whet {
namespace {

// Pauses before a thread sleeps; some 20 to 50 microseconds. Longer would take the core from a busy neighbour.
constexpr int kSpins = 1500;

// Whether this thread is running a body, whose own loops are then its alone.
thread_local bool is_within = false;
struct Within {
  Within() { is_within = true; }
  ~Within() { is_within = false; }
};

class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: its threads may outlive main
    return *pool;
  }

  void resize(int count) {
    const std::lock_guard<std::mutex> call(call_);
    if (count < 1) count = 1;
    if (count == count_) return;
    stop();
    count_ = count;
    stopping_.store(false);
    for (int i = 1; i < count_; ++i) threads_.emplace_back([this, i] { work(i); });
  }

  int count() {
    const std::lock_guard<std::mutex> call(call_);
    return count_;
  }

  void run(Body body, void* context, int64_t total, bool in_order) {
    if (is_within) {
      for (int64_t i = 0; i < total; ++i) body(context, i);
      return;
    }
    const std::lock_guard<std::mutex> call(call_);
    if (threads_.empty() || total <= 1) {
      const Within within;
      for (int64_t i = 0; i < total; ++i) body(context, i);
      return;
    }
    // Closed while the fields change: a thread that is late from the job before holds a ticket that is no longer the
    // present one, or finds a job that has no piece left.
    const uint64_t job = (job_ + 1) & 0xffffffffu;
    for (int64_t i = 0; i < ranges_.load(std::memory_order_relaxed); ++i)
      tickets_[i].value.store(job_ << 32 | 0xffffffffu, std::memory_order_seq_cst);
    const int64_t ranges = in_order ? std::min<int64_t>({count_, kMaxRanges, total}) : 1;
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    total_.store(total, std::memory_order_relaxed);
    ranges_.store(ranges, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    lacked_memory_.store(false, std::memory_order_relaxed);
    job_ = job;
    WHET_DELAY();
    // The first one last: it is where the others look for a job.
    for (int64_t i = ranges - 1; i >= 0; --i)
      tickets_[i].value.store(job << 32 | static_cast<uint64_t>(i * total / ranges), std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      const std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take_pieces(job, 0);
    while (done_.load(std::memory_order_acquire) < total) WHET_PAUSE();
    if (lacked_memory_.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }

 private:
  // Some pieces that follow each other, as the number of the job above that of the next piece: who comes from an older
  // job cannot take any.
  struct alignas(64) Ticket {
    std::atomic<uint64_t> value{0};
  };
  // With more threads than this, some share one: opening each costs the caller something.
  static constexpr int64_t kMaxRanges = 8;

  // Runs pieces of a job until none is left, from the range of this thread on.
  void take_pieces(uint64_t job, int thread) {
    const int64_t ranges = ranges_.load(std::memory_order_relaxed);  // of this job, or there is nothing to take
    int64_t ran = 0;
    for (int64_t i = 0; i < ranges; ++i) ran += take_range(job, (thread + i) % ranges);
    if (ran > 0) done_.fetch_add(ran, std::memory_order_release);
  }

  int64_t take_range(uint64_t job, int64_t range) {
    std::atomic<uint64_t>& from = tickets_[range].value;
    int64_t ran = 0;
    uint64_t ticket = from.load(std::memory_order_acquire);
    for (;;) {
      if (ticket >> 32 != job) return ran;
      WHET_DELAY();
      const auto index = static_cast<int64_t>(ticket & 0xffffffffu);
      const int64_t end = (range + 1) * total_.load(std::memory_order_relaxed) / ranges_.load(std::memory_order_relaxed);
      const Body body = body_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      if (index >= end) return ran;
      if (!from.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      // Not past the caller, whose frame the other threads work on, nor out of a thread.
      try {
        const Within within;
        body(context, index);
      } catch (const std::bad_alloc&) {
        lacked_memory_.store(true, std::memory_order_relaxed);
      }
      ++ran;
      ticket = from.load(std::memory_order_acquire);
    }
  }

  uint64_t present_job() const { return tickets_[0].value.load(std::memory_order_seq_cst) >> 32; }

  void work(int thread) {
    uint64_t seen = present_job();
    for (;;) {
      int spins = 0;
      uint64_t job;
      while ((job = present_job()) == seen && !stopping_.load()) {
        if (++spins < kSpins) {
          WHET_PAUSE();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return present_job() != seen || stopping_.load(); });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      if (stopping_.load()) return;
      seen = job;
      take_pieces(job, thread);
    }
  }

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      stopping_.store(true);
      wake_.notify_all();
    }
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

  std::mutex call_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  int count_ = 1;
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};
  uint64_t job_ = 0;  // the caller's
  Ticket tickets_[kMaxRanges];
  std::atomic<int64_t> total_{0}, ranges_{1};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> lacked_memory_{false};  // a piece of the job did
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
};

}  // namespace

void parallel_for(Body body, void* context, int64_t count, bool in_order) {
  Pool::instance().run(body, context, count, in_order);
}
void set_num_threads(int count) { Pool::instance().resize(count); }
int num_threads() { return Pool::instance().count(); }

}  // namespace whet
