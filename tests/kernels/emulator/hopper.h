// Compute capability 9.0 on a CPU: twins of csrc/wgmma.cuh and hopper.cuh, written from the PTX manual. What it adds to emulator.h's suspicion:
//   a wgmma computes only when waited for, its accumulators are NaN until then, and its operands in shared memory must be the same then
//   as when it was issued; a group of products needs a fence first;
//   what cp.async wrote must have passed a proxy fence before wgmma reads it;
//   a box poisons its destination, in every CTA it goes to, and lands there when nothing else can go on or, with another seed, some time before;
//   so do arrivals at another CTA's barrier, which only cluster_sync hurries; a CTA must not end while any are on their way to it;
//   an mbarrier's phase is over when its arrivals and its bytes are; too many arrivals, and bytes that never come or nobody asked for, are
//   reported; a box needs a fence behind the initialisation of its barrier, and whatever reaches into another CTA a cluster_sync behind that;
//   a box must be one of its tensor map, start at a swizzle atom, stay inside shared memory and not meet another one that has not landed;
//   descriptors are decoded bit by bit, and must start at a swizzle atom and stay inside shared memory.
#pragma once
#include "emulator.h"

struct TensorMap;

namespace emulator {

constexpr u64 TENSOR_MAP = 0x70616d20726f736e;  // as in __init__.py

struct Product {
  bool in_registers, add, computed = false;
  u64 a, b;
  int registers, issued = 0, retired = 0;
  std::vector<float> operand_a, operand_b;  // [64][16], [16][N]
  std::vector<std::vector<float>> d;        // [128][registers], in and out
  long before[128];                         // the product whose result is the input, or -1
  void (*read)(Product&);                   // fills the operands from shared memory
};
struct Warpgroup {
  std::deque<Product> products;
};
struct Issued {
  float* d;
  long product;
};
struct Thread {
  bool fenced = false;
  u64* waits_at = nullptr;
  std::vector<u64*> initialised;  // mbarriers, with no fence since
  std::vector<Issued> open;
  std::deque<std::vector<Issued>> groups;
  long count = 0;
};
// What kernels/compile.py's TensorMap says, as __init__.py encodes it, and where in the matrix a box starts.
struct EncodedMap {
  u64 magic, address;
  u32 element_bytes, rank;
  u64 sizes[5], strides[4];
  u32 box[5], unused[3];
};
static_assert(sizeof(EncodedMap) == 128);
struct Box {
  EncodedMap map;
  i64 start[5];
};
// What one CTA adds to emulator::Cta.
enum Initialisation : unsigned char { NONE, HERE, FENCED, KNOWN };  // of an mbarrier: for this CTA's threads, for boxes, for the cluster
struct HopperCta {
  std::vector<Warpgroup> warpgroups;
  std::vector<Thread> threads;
  Initialisation barriers[SHARED_LIMIT / 8];
};
// On its way to a CTA: a part of a box with its bytes, or an arrival from another CTA.
struct Message {
  Cta* to;
  u32 barrier;      // address there
  Fiber* arriving;  // who arrives, or null: a box
  u32 box_address;
  Box box;
};
inline std::vector<HopperCta> hopper;  // of the cluster
inline std::vector<Message> messages;
inline int eighths;  // the chance, drawn for a cluster, that a message arrives while threads still run
inline int cluster_arrived;
inline unsigned cluster_generation;
inline HopperCta& here() { return hopper[cta->rank]; }
inline Thread& this_thread() { return here().threads[current->index.x]; }

bool land_something();
void land_by_chance();
const char* reason_of_waiting();
inline const bool hopper_hooks = [] {
  cluster_begins = [] {
    hopper.assign(cluster.size(), HopperCta());
    for (auto& member : hopper) {
      member.warpgroups = std::vector<Warpgroup>(block_size.x / 128);
      member.threads = std::vector<Thread>(block_size.x);
    }
    messages.clear();
    eighths = std::max(0, int(randomness() % 6) - 2);
    cluster_arrived = 0;
  };
  time_passes = [] { land_by_chance(); };
  all_wait = [] {
    if (land_something()) return true;
    failure = reason_of_waiting();
    return false;
  };
  thread_ends = [] {
    Thread& thread = this_thread();
    if (!thread.open.empty() || !thread.groups.empty()) failure = "a thread ended with products not committed or not waited for";
    for (const Message& message : messages)
      if (cta->live == 1 && message.to == cta) failure = "a CTA ended while a box or an arrival was on its way to it";
  };
  return true;
}();

inline unsigned short swizzled(u32 address) {
  address ^= (address >> 7 & 7) << 4;
  if (address + 2 > shared_bytes) fail("a matrix descriptor leads outside shared memory");
  if (cta->unfenced[address / 16]) fail("wgmma reads what cp.async wrote without a fence.proxy.async in between");
  return element(cta->shared_memory + address, 0);
}
inline u32 field(u64 descriptor, int bit) { return u32(descriptor >> bit & 0x3fff) * 16; }
inline void check(u64 descriptor, bool k_major) {
  if (descriptor >> 62 != 1) fail("a matrix descriptor without 128-byte swizzle");
  if (descriptor >> 46 & 0xffff) fail("a matrix descriptor with unused bits or a base offset");
  const u32 start = field(descriptor, 0);
  if (start / 128 % 8 || start % 128 > 96 || (!k_major && start % 128)) fail("a matrix descriptor that does not start at a swizzle atom");
}
template <class T>
void read_operands(Product& p) {
  const int columns = p.registers * 2;
  auto value = [](unsigned short bits) { return to_float(T{bits}); };
  if (!p.in_registers) {
    check(p.a, true);
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 16; ++k)
        p.operand_a[m * 16 + k] = value(swizzled(field(p.a, 0) + m / 8 * field(p.a, 32) + m % 8 * 128 + k * 2));
  }
  check(p.b, !p.in_registers);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n) {
      const u32 offset = p.in_registers ? n / 64 * field(p.b, 16) + n % 64 * 2 + k / 8 * field(p.b, 32) + k % 8 * 128
                                        : n / 8 * field(p.b, 32) + n % 8 * 128 + k * 2;
      p.operand_b[k * columns + n] = value(swizzled(field(p.b, 0) + offset));
    }
}

template <class T, int R>
void issue(float* d, const u32* a, u64 a_matrix, u64 b_matrix, bool add) {
  Thread& thread = this_thread();
  auto& products = here().warpgroups[current->index.x / 128].products;
  if (!thread.fenced) fail("wgmma without wgmma.fence");
  const long index = thread.count++;
  if (index == long(products.size())) {
    Product p;
    p.in_registers = a != nullptr;
    p.add = add;
    p.a = a_matrix;
    p.b = b_matrix;
    p.registers = R;
    p.operand_a.resize(64 * 16);
    p.operand_b.resize(16 * 2 * R);
    p.d.assign(128, std::vector<float>(R));
    p.read = read_operands<T>;
    p.read(p);
    products.push_back(std::move(p));
  }
  Product& p = products[index];
  if (p.in_registers != (a != nullptr) || p.a != a_matrix || p.b != b_matrix || p.add != add || p.registers != R)
    fail("threads of one warpgroup issue different wgmma");
  const int rank = current->index.x % 128, row = rank / 32 * 16 + current->lane / 4, t = current->lane % 4;
  if (a != nullptr)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j)
        p.operand_a[(row + i % 2 * 8) * 16 + i / 2 * 8 + 2 * t + j] = to_float(T{(unsigned short)(a[i] >> (16 * j))});
  p.before[rank] = -1;
  auto look = [&](const std::vector<Issued>& group) {
    for (const Issued& other : group)
      if (other.d == d) p.before[rank] = other.product;
  };
  for (auto& group : thread.groups) look(group);
  look(thread.open);
  if (p.before[rank] < 0) std::copy(d, d + R, p.d[rank].begin());
  std::fill(d, d + R, NAN);
  thread.open.push_back({d, index});
  ++p.issued;
  ++events;
}

inline void compute(std::deque<Product>& products, Product& p) {
  const std::vector<float> a = p.operand_a, b = p.operand_b;
  p.read(p);
  if (std::memcmp(a.data(), p.operand_a.data(), a.size() * 4) || std::memcmp(b.data(), p.operand_b.data(), b.size() * 4))
    fail("shared memory changed under a wgmma that was not waited for");
  const int columns = p.registers * 2;
  for (int rank = 0; rank < 128; ++rank) {
    std::vector<float>& d = p.d[rank];
    if (p.before[rank] >= 0) d = products[p.before[rank]].d[rank];
    if (!p.add) std::fill(d.begin(), d.end(), 0.0f);
    for (int i = 0; i < p.registers; ++i) {
      const int row = rank / 32 * 16 + rank % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + rank % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < 16; ++k) sum += double(a[row * 16 + k]) * b[k * columns + column];
      d[i] = float(sum);
    }
  }
  p.computed = true;
}

inline void retire(size_t pending) {
  Thread& thread = this_thread();
  auto& products = here().warpgroups[current->index.x / 128].products;
  const int rank = current->index.x % 128;
  while (thread.groups.size() > pending) {
    for (const Issued& issued : thread.groups.front()) {
      wait_while(&products[issued.product].issued, 128, 0);  // until all have
      Product& p = products[issued.product];
      if (!p.computed) compute(products, p);
      std::copy(p.d[rank].begin(), p.d[rank].end(), issued.d);
    }
    const auto done = std::move(thread.groups.front());
    thread.groups.pop_front();
    for (const Issued& issued : done)
      for (const auto& group : thread.groups)
        for (const Issued& later : group)
          if (later.d == issued.d) std::fill(later.d, later.d + products[later.product].registers, NAN);
    ++events;
  }
}

// An mbarrier's phase is over when arrivals and bytes are: boxes take away what barrier_arrive_expecting adds, in any order.
struct SharedBarrier {
  u32 phase : 1;
  int bytes : 31;
  unsigned short expected, missing;
};
static_assert(sizeof(SharedBarrier) == 8);
constexpr int BYTES_LIMIT = (1 << 20) - 1;
inline SharedBarrier& shared_barrier(u64* barrier) {
  if ((uintptr_t)barrier % 8 || !in_shared(barrier, 8)) fail("an mbarrier outside shared memory or unaligned");
  return *(SharedBarrier*)barrier;
}
inline SharedBarrier& initialised_barrier(u64* barrier) {
  SharedBarrier& b = shared_barrier(barrier);
  if (b.expected == 0xffff) fail("an mbarrier used before its initialisation");
  return b;
}
inline void count(SharedBarrier& b, int arriving, int bytes) {
  if (b.missing < arriving) fail("more arrivals at an mbarrier than it was initialised for");
  b.missing -= arriving;
  if (std::abs(b.bytes + bytes) > BYTES_LIMIT) fail("more bytes than an mbarrier can count");
  b.bytes += bytes;
  if (b.missing == 0 && b.bytes == 0) b.missing = b.expected, b.phase ^= 1;
  ++events;
}
inline u32 address(const void* pointer) { return u32((const unsigned char*)pointer - cta->shared_memory); }
inline u64* at(Cta& there, u32 address) { return (u64*)(there.shared_memory + address); }

}  // namespace emulator

inline u32 shared_address(const void* pointer) { return emulator::address(pointer); }

inline void barrier_init(u64* barrier, int arrivals) {
  emulator::SharedBarrier& b = emulator::shared_barrier(barrier);
  b.phase = 0, b.bytes = 0;
  b.expected = b.missing = arrivals;
  emulator::here().barriers[shared_address(barrier) / 8] = emulator::HERE;
  emulator::this_thread().initialised.push_back(barrier);
}
inline void barrier_arrive(u64* barrier) { emulator::count(emulator::initialised_barrier(barrier), 1, 0); }
inline void barrier_arrive_expecting(u64* barrier, u32 bytes) {
  emulator::count(emulator::initialised_barrier(barrier), 1, int(bytes));
}
inline void barrier_wait(u64* barrier, u32 parity) {
  emulator::initialised_barrier(barrier);
  emulator::this_thread().waits_at = barrier;
  emulator::wait_while(barrier, 1, parity);  // the phase
  emulator::this_thread().waits_at = nullptr;
  ++emulator::events;
}

// Clusters and boxes.
namespace emulator {

// Another CTA of the cluster, or this one, whose barrier at this one's address is about to be used.
inline Cta& reach(u32 rank, u64* barrier, bool by_box) {
  if (rank >= cluster.size()) fail("a CTA outside the cluster");
  Cta& there = *cluster[rank];
  shared_barrier(barrier);
  const Initialisation state = hopper[rank].barriers[address(barrier) / 8];
  if (there.live == 0) fail("a CTA of the cluster has ended, and another one reaches for its shared memory");
  if (&there != cta && state != KNOWN) fail("an mbarrier of another CTA without barriers_initialised and then cluster_sync there");
  if (state == NONE) fail("an mbarrier used before its initialisation");
  if (by_box && state == HERE) fail("a box for an mbarrier without a fence behind its initialisation");
  return there;
}

// Calls f(offset in shared memory, address in global memory or 0 where the box lies outside the matrix) for its elements.
template <class F>
void for_elements(const Box& box, F f) {
  const EncodedMap& map = box.map;
  u32 rows = 1;
  for (u32 i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (u32 row = 0; row < rows; ++row) {
    u64 place = map.address;
    bool inside = true;
    for (u32 i = 1, rest = row; i < map.rank; rest /= map.box[i++]) {
      const i64 x = box.start[i] + rest % map.box[i];
      inside = inside && x >= 0 && x < i64(map.sizes[i]);
      place += x * map.strides[i - 1];
    }
    for (u32 i = 0; i < map.box[0]; ++i) {
      const i64 x = box.start[0] + i;
      const u32 byte = i * map.element_bytes;
      f(row * 128 + ((byte / 16 ^ row % 8) * 16) + byte % 16, inside && x >= 0 && x < i64(map.sizes[0]) ? place + x * map.element_bytes : 0);
    }
  }
}
inline u32 bytes_of(const EncodedMap& map) {
  u32 bytes = map.element_bytes;
  for (u32 i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

template <int RANK>
void send_box(u32 ctas, void* to, const TensorMap* encoded, u64* barrier, const int (&start)[RANK]) {
  Box box;
  std::memcpy(&box.map, encoded, sizeof box.map);
  if (box.map.magic != TENSOR_MAP) fail("a box of something that is not a tensor map");
  if (box.map.rank != RANK) fail("a box of more or fewer dimensions than its tensor map");
  std::copy(start, start + RANK, box.start);
  if (!current->waited && !late.empty())
    for_elements(box, [](u32, u64 from) { if (from) must_be_there((const void*)from, 2); });
  if ((uintptr_t)to % 1024 || !in_shared(to, bytes_of(box.map))) fail("a box that lands outside shared memory or unaligned");
  if (ctas == 0 || ctas >> cluster.size()) fail("a box to no CTA, or to one outside the cluster");
  for (u32 rank = 0; rank < cluster.size(); ++rank)
    if (ctas >> rank & 1) {
      Cta& there = reach(rank, barrier, true);
      for (const Message& other : messages)
        if (!other.arriving && other.to == &there && other.box_address < address(to) + bytes_of(box.map) &&
            address(to) < other.box_address + bytes_of(other.box.map))
          fail("a box to where another one has not landed yet");
      std::memset(there.shared_memory + address(to), 0xff, bytes_of(box.map));
      messages.push_back({&there, address(barrier), nullptr, address(to), box});
    }
  ++events;
}

inline void deliver(size_t i) {
  const Message message = messages[i];
  messages.erase(messages.begin() + i);
  SharedBarrier& barrier = *(SharedBarrier*)at(*message.to, message.barrier);
  if (message.arriving) return count(barrier, 1, 0);
  unsigned char* to = message.to->shared_memory + message.box_address;
  for_elements(message.box, [&](u32 offset, u64 from) {
    const unsigned short x = from ? element((const void*)from, 0) : 0;
    std::memcpy(to + offset, &x, sizeof x);
  });
  count(barrier, 0, -int(bytes_of(message.box.map)));
}
inline void land_by_chance() {
  for (size_t i = messages.size(); i-- > 0 && !failure;)
    if (int(randomness() % 8) < eighths) deliver(i);
}
inline bool land_something() {
  if (messages.empty()) return false;
  for (size_t n = randomness() % messages.size() + 1; n > 0; --n) deliver(randomness() % messages.size());
  return true;
}
inline const char* reason_of_waiting() {
  for (const HopperCta& member : hopper)
    for (const Thread& thread : member.threads) {
      if (!thread.waits_at) continue;
      const SharedBarrier& b = *(SharedBarrier*)thread.waits_at;
      if (b.bytes > 0) return "deadlock: an mbarrier expects bytes that no box brings";
      if (b.bytes < 0) return "deadlock: boxes brought an mbarrier bytes that it was not told to expect";
    }
  return nullptr;
}
inline void fence_barriers() {
  for (u64* barrier : this_thread().initialised) here().barriers[address(barrier) / 8] = FENCED;
  this_thread().initialised.clear();
}

}  // namespace emulator

inline u32 cluster_rank() { return emulator::cta->rank; }
inline void barrier_arrive_at(u64* barrier, u32 cta) {
  emulator::Cta& there = emulator::reach(cta, barrier, false);
  if (&there == emulator::cta) return barrier_arrive(barrier);
  emulator::messages.push_back({&there, shared_address(barrier), emulator::current, 0, {}});
  ++emulator::events;
}
inline void barriers_initialised() { emulator::fence_barriers(); }
inline void cluster_sync() {
  emulator::exchange(emulator::CLUSTER_SYNC, 0);
  auto& messages = emulator::messages;  // what this thread has done is done for the others behind it
  for (size_t i = messages.size(); i-- > 0;)
    if (messages[i].arriving == emulator::current) emulator::deliver(i);
  ++emulator::events;
  if (++emulator::cluster_arrived == int(emulator::block_size.x * emulator::cluster.size())) {
    for (auto& member : emulator::hopper)
      for (auto& state : member.barriers)
        if (state == emulator::FENCED) state = emulator::KNOWN;
    emulator::cluster_arrived = 0;
    ++emulator::cluster_generation;
  } else {
    emulator::wait_while(&emulator::cluster_generation, ~0u, emulator::cluster_generation);
  }
}
inline void cluster_meet() { cluster_sync(); }
inline void prefetch_map(const TensorMap*) {}
inline void copy_box_once(void* to, const TensorMap* map, u64* barrier, int a, int b, int c, int d) {
  emulator::send_box<4>(1u << cluster_rank(), to, map, barrier, {a, b, c, d});
}
inline void copy_box(void* to, const TensorMap* map, u64* barrier, int a, int b, int c, int d, int e, u64) {
  emulator::send_box<5>(1u << cluster_rank(), to, map, barrier, {a, b, c, d, e});
}
inline void copy_box(void* to, const TensorMap* map, u64* barrier, int a, int b) {
  emulator::send_box<2>(1u << cluster_rank(), to, map, barrier, {a, b});
}
inline void copy_box_to(u32 ctas, void* to, const TensorMap* map, u64* barrier, int a, int b) {
  emulator::send_box<2>(ctas, to, map, barrier, {a, b});
}

inline void fence_async_proxy() {
  for (int unit : emulator::current->unfenced_units) emulator::cta->unfenced[unit] = false;
  emulator::current->unfenced_units.clear();
  emulator::fence_barriers();
}
template <int REGISTERS>
void take_registers() { static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256); }
template <int REGISTERS>
void give_registers() { static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256); }

inline void wgmma_fence() { emulator::this_thread().fenced = true; }
inline void wgmma_commit() {
  auto& thread = emulator::this_thread();
  thread.fenced = false;
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int PENDING>
void wgmma_wait() { emulator::retire(PENDING); }
template <int N>
void keep_order(float (&)[N][4]) {}
template <class T, int N>
void wgmma(float (&d)[N / 8][4], u64 a, u64 b, int accumulate) { emulator::issue<T, N / 2>(d[0], nullptr, a, b, accumulate != 0); }
template <class T, int N>
void wgmma(float (&d)[N / 8][4], const u32 (&a)[4], u64 b) { emulator::issue<T, N / 2>(d[0], a, 0, b, true); }
