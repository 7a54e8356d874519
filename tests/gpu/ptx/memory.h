// The memory that a kernel sees, every access checked: bounds, alignment, races and copies that nobody waited for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr uint16_t kSeveral = 0xFFFF;    // threads of several warps
constexpr uint16_t kSeveralOf = 0x8000;  // threads of the warp in the lower bits

// When a thread does something. Barriers of the block begin a new epoch, of which no two blocks share one; barriers of
// the warp begin a new turn.
struct Moment {
  uint32_t first_epoch;  // of this block
  uint32_t epoch, turn;
  uint16_t thread;
};

// Whether `then` lies before `now` for sure: by a barrier, or in the same thread.
inline bool ordered(const Moment& now, uint32_t epoch, uint32_t turn, uint16_t thread) {
  if (epoch < now.epoch) return epoch >= now.first_epoch;
  if (thread == now.thread) return true;
  if (thread == kSeveral) return false;
  const int warp = thread & kSeveralOf ? thread & ~kSeveralOf : thread / 32;
  return warp == now.thread / 32 && turn < now.turn;
}

// What is known of one byte. Epoch 0 is before the launch.
struct Byte {
  uint32_t write_epoch = 0, write_turn = 0, read_epoch = 0, read_turn = 0, first_read = 0;
  uint16_t writer = 0, reader = 0;
  bool copying = false;  // an asynchronous copy is on its way to it
};

inline std::string hex(uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// A stretch of memory that begins at `base` for the kernel and at `data` here.
class Region {
 public:
  Region(uint64_t base, uint8_t* data, uint64_t size, bool shared)
      : base_(base), size_(size), data_(data), shared_(shared), bytes_(size) {}

  bool holds(uint64_t address, uint64_t count) const {
    return address >= base_ && count <= size_ && address - base_ <= size_ - count;
  }

  void read(uint64_t address, int count, void* to, const Moment& now) {
    for (int i = 0; i < count; ++i) {
      Byte& byte = bytes_[address - base_ + i];
      if (byte.copying) throw std::runtime_error("reads what an asynchronous copy brings, without a wait for it");
      if (byte.write_epoch && !ordered(now, byte.write_epoch, byte.write_turn, byte.writer)) {
        throw std::runtime_error("reads what " + thread_name(now, byte.write_epoch, byte.writer) +
                                 " wrote, without a barrier between");
      }
      if (shared_ && !byte.write_epoch) throw std::runtime_error("reads shared memory that nobody wrote");
      note_reader(byte, now);
    }
    memcpy(to, data_ + (address - base_), count);
  }

  void write(uint64_t address, int count, const void* from, const Moment& now) {
    for (int i = 0; i < count; ++i) {
      Byte& byte = bytes_[address - base_ + i];
      if (byte.copying) throw std::runtime_error("writes where an asynchronous copy is on its way to");
      // Nobody sees a write of what is there, as by threads that all hold the same number.
      const bool same = static_cast<const uint8_t*>(from)[i] == data_[address - base_ + i];
      if (same && (byte.write_epoch || !shared_)) continue;
      check_overwriting(byte, now);
      byte.write_epoch = now.epoch, byte.write_turn = now.turn, byte.writer = now.thread;
    }
    memcpy(data_ + (address - base_), from, count);
  }

  // An asynchronous copy to here begins, and ends.
  void expect(uint64_t address, int count, const Moment& now) {
    for (int i = 0; i < count; ++i) {
      Byte& byte = bytes_[address - base_ + i];
      if (byte.copying) throw std::runtime_error("copies to where another asynchronous copy is on its way to");
      check_overwriting(byte, now);
      byte.copying = true;
    }
  }
  void arrive(uint64_t address, int count, const void* from, const Moment& now) {
    for (int i = 0; i < count; ++i) bytes_[address - base_ + i].copying = false;
    write(address, count, from, now);
  }

  // What an asynchronous copy or product reads must not change until it is waited for.
  void check_unchanged(uint64_t address, int count, uint32_t since) {
    for (int i = 0; i < count; ++i) {
      if (bytes_[address - base_ + i].write_epoch > since) {
        throw std::runtime_error("waits for what reads a place that was written meanwhile");
      }
    }
  }

 private:
  static std::string thread_name(const Moment& now, uint32_t epoch, uint16_t thread) {
    return (epoch < now.first_epoch ? "another block's thread " : "thread ") + std::to_string(thread);
  }

  void check_overwriting(const Byte& byte, const Moment& now) {
    if (byte.write_epoch && !ordered(now, byte.write_epoch, byte.write_turn, byte.writer)) {
      throw std::runtime_error("overwrites what " + thread_name(now, byte.write_epoch, byte.writer) +
                               " wrote, without a barrier between");
    }
    if (byte.read_epoch && (byte.first_read < now.first_epoch ||
                            !ordered(now, byte.read_epoch, byte.read_turn, byte.reader))) {
      throw std::runtime_error("overwrites what another thread read, without a barrier between");
    }
  }

  static void note_reader(Byte& byte, const Moment& now) {
    if (!byte.first_read) byte.first_read = now.epoch;
    if (byte.read_epoch != now.epoch) {
      byte.reader = now.thread;
    } else if (byte.reader != now.thread) {
      const int warp = byte.reader & kSeveralOf ? byte.reader & ~kSeveralOf : byte.reader / 32;
      if (byte.reader == kSeveral || warp != now.thread / 32) {
        byte.reader = kSeveral;
      } else {
        byte.reader = byte.read_turn < now.turn ? now.thread : kSeveralOf | (now.thread / 32);
      }
    }
    byte.read_epoch = now.epoch, byte.read_turn = now.turn;
  }

  uint64_t base_, size_;
  uint8_t* data_;
  bool shared_;
  std::vector<Byte> bytes_;
};

// All of one space: the tensors that a launch was given, or a block's shared memory.
class Space {
 public:
  explicit Space(const char* name) : name_(name) {}

  void add(uint64_t base, uint8_t* data, uint64_t size, bool shared) {
    if (size) regions_.emplace_back(base, data, size, shared);
  }
  void clear() { regions_.clear(), last_ = 0; }

  // The region of an access of `count` bytes. Raises where it is misaligned or none holds all of them.
  Region& at(uint64_t address, int count) {
    if (address % count) throw std::runtime_error("address " + hex(address) + " is no multiple of " + std::to_string(count));
    if (last_ < regions_.size() && regions_[last_].holds(address, count)) return regions_[last_];
    for (size_t i = 0; i < regions_.size(); ++i) {
      if (regions_[i].holds(address, count)) return regions_[last_ = i];
    }
    throw std::runtime_error("address " + hex(address) + " with " + std::to_string(count) + " bytes is outside of " + name_);
  }

 private:
  const char* name_;
  std::vector<Region> regions_;
  size_t last_ = 0;
};

}  // namespace ptx
