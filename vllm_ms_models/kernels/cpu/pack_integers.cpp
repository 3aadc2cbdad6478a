// Loading weights of small integers into panels (gemm_integers.cpp describes the layout), and their scales.
//
// As in pack.cpp a row of the checkpoint becomes one lane of a panel, written in blocks of inputs that stay in L1 for all
// rows of the panel. Moving bytes about gains nothing from wider registers: this is compiled once.

#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace vllm_ms {
namespace {

constexpr long kBlock = 2048;  // inputs; 32 KB of a panel

long min(long a, long b) { return a < b ? a : b; }

// body(chunk) for every chunk, on several threads.
template <class Body>
void parallel(long chunks, const Body& body) {
  run_chunks(
      chunks, [](void* context, long chunk, int) { (*static_cast<const Body*>(context))(chunk); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// `count` inputs from input `k` (a multiple of 8) of one row, to its lane.
void pack_unsigned(const int8_t* values, char* panel, long lane, long k, long count) {
  char* to = panel + k * 16 + lane * 4;
  uint32_t word;
  long i = 0;
  for (; i + 4 <= count; i += 4) {
    memcpy(&word, values + i, 4);
    word ^= 0x80808080u;
    memcpy(to + i * 16, &word, 4);
  }
  if (i == count) return;
  word = 0;
  memcpy(&word, values + i, size_t(count - i));
  word ^= 0x80808080u;
  memcpy(to + i * 16, &word, 4);
}

void pack_bytes(const int8_t* values, char* panel, long lane, long k, long count) {
  char* to = panel + k * 16 + lane;
  for (long i = 0; i < count; ++i) to[i * 16] = char(values[i]);
}

void pack_nibbles(const int8_t* values, char* panel, long lane, long k, long count) {
  char* to = panel + k * 8 + lane * 4;
  const auto pack = [&](long i, long size) {
    uint32_t word = 0;
    for (long j = 0; j < size; ++j) word |= (uint32_t(values[i + j]) & 15) << (j / 2 * 4 + j % 2 * 16);
    memcpy(to + i * 8, &word, 4);
  };
  long i = 0;
  for (; i + 8 <= count; i += 8) pack(i, 8);
  if (i < count) pack(i, count - i);
}

}  // namespace

void pack_integers(const Packed& weight, int part, long first_row, const int8_t* values, long rows, long stride) {
  if (rows <= 0) return;
  const auto pack = weight.bits == 4 ? pack_nibbles : weight.input == Input::kFloat ? pack_bytes : pack_unsigned;
  char* panels = static_cast<char*>(weight.data) + panel_of(weight, part, first_row) * weight.panel_bytes;
  const long first_lane = first_row % 16;
  parallel((first_lane + rows + 15) / 16, [&](long index) {
    const long begin = index ? index * 16 - first_lane : 0, end = min((index + 1) * 16 - first_lane, rows);
    char* panel = panels + index * weight.panel_step * weight.panel_bytes;
    for (long k = 0; k < weight.in_features; k += kBlock)
      for (long row = begin; row < end; ++row)
        pack(values + row * stride + k, panel, (first_lane + row) % 16, k, min(kBlock, weight.in_features - k));
  });
}

void pack_scales(Packed& weight, int part, long first_row, const float* scales, const int8_t* zeros,
                 const int32_t* addends, long rows) {
  const long groups = weight.groups;
  for (long i = 0; zeros && i < rows * groups; ++i) weight.has_zeros |= zeros[i] != 0;
  for (long row = 0; row < rows; ++row) {
    const long panel = panel_of(weight, part, first_row + row), lane = (first_row + row) % 16;
    for (long group = 0; group < groups; ++group) {
      const long at = (panel * groups + group) * 16 + lane;
      weight.scales[at] = scales[row * groups + group];
      if (weight.has_zeros) weight.zeros[at] = zeros ? zeros[row * groups + group] : int8_t(0);
    }
    if (weight.addends) weight.addends[panel * 16 + lane] = addends ? addends[row] : 0;
  }
}

}  // namespace vllm_ms
