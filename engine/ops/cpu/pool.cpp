// A pool of threads for loops of some tens of microseconds.
//
// A decoded token takes hundreds of such loops, one after the other. So a thread that has run out of work looks for
// more for a little while before it sleeps, and the caller never waits for a thread that has not woken: it takes the
// pieces itself.
#include <atomic>
#include <condition_variable>
#include <mutex>
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
    for (int i = 1; i < count_; ++i) threads_.emplace_back([this] { work(); });
  }

  void run(Body body, void* context, int64_t total) {
    const std::lock_guard<std::mutex> call(call_);
    if (threads_.empty() || total <= 1) {
      for (int64_t i = 0; i < total; ++i) body(context, i);
      return;
    }
    const uint64_t last = ticket_.load(std::memory_order_relaxed) >> 32, job = last + 1;
    // Closed while the fields change: a thread that is late from the job before holds a ticket that is no longer the
    // present one, or finds a job that has no piece left.
    ticket_.store(last << 32 | 0xffffffffu, std::memory_order_seq_cst);
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    total_.store(total, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    WHET_DELAY();
    ticket_.store(job << 32, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      const std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take_pieces(job);
    while (done_.load(std::memory_order_acquire) < total) WHET_PAUSE();
  }

 private:
  // Runs pieces of a job until none is left. A piece is taken by advancing the ticket, which holds the job's number
  // above the next piece's: who comes from an older job cannot take any.
  void take_pieces(uint64_t job) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      if (ticket >> 32 != job) return;
      WHET_DELAY();
      const auto index = static_cast<int64_t>(ticket & 0xffffffffu);
      const int64_t total = total_.load(std::memory_order_relaxed);
      const Body body = body_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      if (index >= total) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      body(context, index);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void work() {
    uint64_t seen = ticket_.load(std::memory_order_acquire) >> 32;
    for (;;) {
      int spins = 0;
      uint64_t job;
      while ((job = ticket_.load(std::memory_order_acquire) >> 32) == seen && !stopping_.load()) {
        if (++spins < kSpins) {
          WHET_PAUSE();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return ticket_.load(std::memory_order_seq_cst) >> 32 != seen || stopping_.load(); });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      if (stopping_.load()) return;
      seen = job;
      take_pieces(job);
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
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> total_{0}, done_{0};
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
};

}  // namespace

void parallel_for(Body body, void* context, int64_t count) { Pool::instance().run(body, context, count); }
void set_num_threads(int count) { Pool::instance().resize(count); }

}  // namespace whet
