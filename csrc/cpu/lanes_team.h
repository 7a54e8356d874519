// Threads that take blocks of one piece of work as they come to them.
//
// The caller works too, and at the end waits only for blocks that someone has begun: a thread that another process keeps from its
// core, and so begins none, holds up nobody. A parallel region of OpenMP waits for every thread instead, which on a busy machine
// takes longer than most of the work here.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastebm {

class LaneTeam {
 public:
  // Calls run(worker, block) once for each block, with workers from 0 to `workers` - 1, each of which runs one at a time.
  static void run(int64_t workers, int64_t blocks, const std::function<void(int64_t, int64_t)>& run) {
    const auto work = std::make_shared<Work>(blocks, run);
    if (workers > 1) of_process().help(workers - 1, work);
    work->take();
    work->wait();
  }

 private:
  struct Work {
    Work(int64_t count, const std::function<void(int64_t, int64_t)>& function) : blocks(count), run(function) {}

    // `run` belongs to the caller, who waits while any block is unfinished: nothing may be touched of it after the last one.
    void take() {
      int64_t worker = -1;
      for (int64_t block; (block = next.fetch_add(1)) < blocks;) {
        if (worker < 0) worker = workers.fetch_add(1);
        run(worker, block);
        const std::lock_guard<std::mutex> lock(mutex);
        if (++finished == blocks) all_finished.notify_all();
      }
    }
    void wait() {
      std::unique_lock<std::mutex> lock(mutex);
      all_finished.wait(lock, [this] { return finished == blocks; });
    }

    const int64_t blocks;
    const std::function<void(int64_t, int64_t)>& run;
    std::atomic<int64_t> next{0}, workers{0};
    int64_t finished = 0;
    std::mutex mutex;
    std::condition_variable all_finished;
  };

  // Never destroyed, since its threads outlive main. A process that was forked has none of them and gets its own.
  static LaneTeam& of_process() {
    static std::mutex mutex;
    static LaneTeam* team = nullptr;
    static pid_t process = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    if (process != getpid()) {
      team = new LaneTeam;
      process = getpid();
    }
    return *team;
  }

  void help(int64_t count, const std::shared_ptr<Work>& work) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; threads_ < count; ++threads_) std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {  // the process may have no more threads: those that there are do the work
      }
      for (int64_t i = 0; i < std::min(count, threads_); ++i) waiting_.push_back(work);
    }
    count == 1 ? ready_.notify_one() : ready_.notify_all();
  }

  void serve() {
    for (;;) {
      std::shared_ptr<Work> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return !waiting_.empty(); });
        work = std::move(waiting_.front());
        waiting_.pop_front();
      }
      work->take();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::shared_ptr<Work>> waiting_;
  int64_t threads_ = 0;
};

}  // namespace fastebm
