// A CPU memory arena of whole pages for the blocks that steps of accelerated networks allocate.
//
//   allocate(n):  chooses the free run in which n bytes need the fewest new pages; among equals the smallest. Beyond
//                 the limit, other free pages are returned to the system first.
//   free(p):      joins the run with its free neighbours; its pages remain resident unless they exceed the limit.
//
// The C library's heap does not reuse a hole for an aligned block of the same size, because glibc's memalign requests
// more and cuts. A step that repeatedly frees and allocates the same sizes then holds up to twice the bytes in use.
// Here the block fits, and the bytes in use, held, and at most in use are always known.
//
// Threads use the arena between `arena_enter` and `arena_leave`. Other allocations, and small blocks, use PyTorch's
// allocator.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kLeast = 64 << 10;  // smaller blocks gain nothing from the arena

thread_local int inside = 0;

class Arena {
 public:
  bool reserve(size_t bytes) {
    void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return false;
    const size_t words = (bytes / kPage + 63) / 64;
    held_bits_ = static_cast<uint64_t*>(calloc(words, sizeof(uint64_t)));  // its pages become resident when written
    if (held_bits_ == nullptr) return false;
    madvise(start, bytes, MADV_DONTDUMP);
    madvise(start, bytes, MADV_NOHUGEPAGE);  // huge pages would hold more bytes than are counted
    start_ = static_cast<char*>(start);
    pages_ = bytes / kPage;
    free_[0] = pages_;
    return true;
  }

  bool owns(const void* p) const {
    return p >= start_ && p < start_ + pages_ * kPage;
  }

  // Returns null if no run is long enough.
  void* allocate(size_t bytes) {
    const size_t pages = (bytes + kPage - 1) / kPage;
    std::lock_guard<std::mutex> lock(mutex);
    auto best = free_.end();
    size_t fewest = SIZE_MAX;
    for (auto run = free_.begin(); run != free_.end(); ++run) {
      if (run->second < pages) continue;
      const size_t fresh = pages - held_among(run->first, pages);
      if (fresh < fewest || (fresh == fewest && run->second < best->second)) {
        best = run;
        fewest = fresh;
      }
    }
    if (best == free_.end()) return nullptr;
    const size_t first = best->first, length = best->second;
    free_.erase(best);
    if (length > pages) free_[first + pages] = length - pages;
    if (held_ + fewest > limit_) give_back(held_ + fewest - limit_);
    hold(first, pages);
    used_[first] = pages;
    in_use_ += pages;
    most_in_use_ = std::max(most_in_use_, in_use_);
    return start_ + first * kPage;
  }

  void free(void* p) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto block = used_.find((static_cast<char*>(p) - start_) / kPage);
    const size_t first = block->first;
    size_t pages = block->second;
    used_.erase(block);
    in_use_ -= held_among(first, pages);
    auto after = free_.lower_bound(first);
    if (after != free_.end() && after->first == first + pages) {
      pages += after->second;
      after = free_.erase(after);
    }
    const auto before = after == free_.begin() ? free_.end() : std::prev(after);
    if (before != free_.end() && before->first + before->second == first) {
      before->second += pages;
    } else {
      free_.emplace_hint(after, first, pages);
    }
    if (held_ > limit_) give_back(held_ - limit_);
  }

  // Returns the whole pages within these bytes of a block to the system; they must not be read again.
  void discard(void* p, size_t bytes) {
    if (!owns(p)) return;
    std::lock_guard<std::mutex> lock(mutex);
    const size_t from = static_cast<char*>(p) - start_;
    const size_t first = (from + kPage - 1) / kPage, end = (from + bytes) / kPage;
    if (first >= end) return;
    in_use_ -= drop(first, end);
  }

  // Sets all bytes of a block to zero. Whole pages become resident when they are written, but count as held before, as
  // those of every new block do.
  void zero_later(void* p, size_t bytes) {
    if (!owns(p)) return;
    char *const from = static_cast<char*>(p), *const to = from + bytes;
    char* const first = start_ + (from - start_ + kPage - 1) / kPage * kPage;
    char* const end = start_ + (to - start_) / kPage * kPage;
    if (first >= end || madvise(first, end - first, MADV_DONTNEED) != 0) {
      std::memset(from, 0, bytes);
      return;
    }
    std::memset(from, 0, first - from);
    std::memset(end, 0, to - end);
  }

  // Sets the limit to the held bytes plus `bytes`; a negative number returns as many bytes if they are free.
  void room(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    const int64_t pages = static_cast<int64_t>(held_) + bytes / static_cast<int64_t>(kPage);
    limit_ = static_cast<size_t>(std::max<int64_t>(0, pages));
    if (held_ > limit_) give_back(held_ - limit_);
  }

  void no_limit() {
    std::lock_guard<std::mutex> lock(mutex);
    limit_ = SIZE_MAX;
  }

  void trim() {
    std::lock_guard<std::mutex> lock(mutex);
    give_back(held_ - in_use_);
  }

  void counts(size_t* out) {
    std::lock_guard<std::mutex> lock(mutex);
    out[0] = in_use_ * kPage;
    out[1] = held_ * kPage;
    out[2] = most_in_use_ * kPage;
  }

  void reset_most() {
    std::lock_guard<std::mutex> lock(mutex);
    most_in_use_ = in_use_;
  }

  std::mutex mutex;

 private:
  // Calls f for each word with bits of these pages: the word's index, and the mask of the bits.
  template <typename F>
  static void words(size_t first, size_t pages, F f) {
    for (size_t page = first, end = first + pages; page < end;) {
      const size_t bit = page % 64, count = std::min(64 - bit, end - page);
      f(page / 64, (count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1) << bit);
      page += count;
    }
  }

  size_t held_among(size_t first, size_t pages) const {
    const size_t end = std::min(first + pages, highest_);  // no page beyond was ever held
    size_t held = 0;
    if (first < end) {
      words(first, end - first, [&](size_t w, uint64_t mask) { held += __builtin_popcountll(held_bits_[w] & mask); });
    }
    return held;
  }

  void hold(size_t first, size_t pages) {
    held_ += pages - held_among(first, pages);
    words(first, pages, [&](size_t w, uint64_t mask) { held_bits_[w] |= mask; });
    highest_ = std::max(highest_, first + pages);
  }

  // Returns this many free pages to the system, those at the highest addresses first.
  void give_back(size_t pages) {
    for (auto run = free_.rbegin(); run != free_.rend() && pages > 0; ++run) {
      size_t first = run->first;
      const size_t end = std::min(first + run->second, highest_);
      if (first >= end) continue;
      const size_t held = held_among(first, end - first);
      if (held == end - first && held > pages) first = end - pages;  // a part suffices
      if (held > 0) pages -= std::min(pages, drop(first, end));
    }
  }

  // Returns the pages [first, end) to the system; the result is how many of them were held.
  size_t drop(size_t first, size_t end) {
    const size_t dropped = held_among(first, end - first);
    madvise(start_ + first * kPage, (end - first) * kPage, MADV_DONTNEED);
    words(first, end - first, [&](size_t w, uint64_t mask) { held_bits_[w] &= ~mask; });
    held_ -= dropped;
    return dropped;
  }

  char* start_ = nullptr;
  size_t pages_ = 0, highest_ = 0;
  size_t in_use_ = 0, held_ = 0, most_in_use_ = 0, limit_ = SIZE_MAX;  // pages
  uint64_t* held_bits_ = nullptr;  // a bit for each page that the process holds
  std::map<size_t, size_t> free_;  // length of each free run, by its first page
  std::unordered_map<size_t, size_t> used_;
};

Arena& arena() {
  static auto* one = new Arena;  // never destroyed: blocks may outlive static destructors
  return *one;
}

c10::Allocator* before = nullptr;  // PyTorch's own

void release(void* p) {
  if (!arena().owns(p)) {
    before->raw_deleter()(p);
    return;
  }
  c10::profiledCPUMemoryReporter().Delete(p);
  arena().free(p);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* p = inside > 0 && bytes >= kLeast ? arena().allocate(bytes) : nullptr;
    if (p == nullptr) return before->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(p, bytes);
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }

  bool is_simple_data_ptr(const c10::DataPtr& data) const override {
    return data.get() == data.get_context();
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;  // oneDNN frees its scratch memory with it
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

extern "C" {

// Installs the arena with an address range of this many bytes; returns whether it is installed.
bool arena_install(size_t bytes) {
  if (before != nullptr) return true;
  c10::Allocator* now = c10::GetCPUAllocator();
  if (now->raw_deleter() == nullptr || !arena().reserve(bytes)) return false;
  before = now;
  pthread_atfork([] { arena().mutex.lock(); }, [] { arena().mutex.unlock(); }, [] { arena().mutex.unlock(); });
  c10::SetCPUAllocator(new Allocator, 255);
  return c10::GetCPUAllocator() != before;
}

void arena_enter() { ++inside; }
void arena_leave() { --inside; }
void arena_room(int64_t bytes) { arena().room(bytes); }
void arena_no_limit() { arena().no_limit(); }
void arena_discard(void* p, size_t bytes) { arena().discard(p, bytes); }
void arena_zero_later(void* p, size_t bytes) { arena().zero_later(p, bytes); }
void arena_trim() { arena().trim(); }
void arena_counts(size_t* out) { arena().counts(out); }
void arena_reset_most() { arena().reset_most(); }
}
