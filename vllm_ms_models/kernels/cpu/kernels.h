// What the binding (module.cpp) and the kernels agree on: dtype codes, the packed weight, the table of one ISA's
// functions.
#pragma once

#include <cstdint>

namespace vllm_ms {

enum DType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt32 = 3, kInt64 = 4, kInt8 = 5 };

inline long dtype_size(int dtype) {
  constexpr long kSizes[] = {4, 2, 2, 4, 8, 1};
  return kSizes[dtype];
}

constexpr long kScaleBytes = 4;  // beside each row of a cache of int8
constexpr int kMaxParts = 64;

enum class Gate : int { kNone = -1, kSilu = 0, kGeluErf = 1, kGeluTanh = 2, kClamped = 3 };
enum class Activation : int { kSilu = 0, kGeluErf = 1, kGeluTanh = 2, kQuickGelu = 3, kRelu = 4 };

// What activations are multiplied as by weights of small integers: themselves, int8 by a scale of each row, int8 by a
// scale and an offset of the weight.
enum class Input : int { kFloat = 0, kDynamic = 1, kStatic = 2 };

// A matrix in panels of 16 rows; gemm.cpp and gemm_integers.cpp describe the layout. Every part begins with a panel of its own; the panels of
// two parts of one size take turns.
struct Packed {
  void* data = nullptr;
  long in_features = 0;
  long out_features = 0;
  int dtype = kFloat32;
  int parts = 0;
  long panels = 0;
  long panel_bytes = 0;
  long panel_step = 1;               // from one panel of a part to its next
  long size[kMaxParts] = {};         // rows of the part
  long first_panel[kMaxParts] = {};  // its first panel
  long first_row[kMaxParts] = {};    // its first row in the unfused numbering

  // Of small integers only:
  int bits = 0;  // 8 or 4
  Input input = Input::kFloat;
  long group_size = 0, groups = 1;   // along the inputs
  float* scales = nullptr;           // [panels][groups][16]
  int8_t* zeros = nullptr;           // [panels][groups][16]
  int32_t* addends = nullptr;        // [panels][16], for int8 activations
  bool has_zeros = false;            // one that is not 0
  float input_scale[kMaxParts] = {};  // of each part
  int input_offset[kMaxParts] = {};
};

// The panel that holds row `row` of a part.
inline long panel_of(const Packed& weight, int part, long row) {
  return weight.first_panel[part] + row / 16 * weight.panel_step;
}

// The part that a panel belongs to.
inline int part_of(const Packed& weight, long panel) {
  int part = weight.panel_step > 1 ? int(panel % weight.panel_step) : weight.parts - 1;
  while (weight.first_panel[part] > panel) --part;
  return part;
}

// Where `linear` puts part i: rows of `stride[i]` elements beginning at `data[i]`.
struct Outputs {
  void* data[kMaxParts];
  long stride[kMaxParts];
  int dtype;
};

// One adapter's matrices for one linear, as `LowRank` in low_rank.py; null if it has none.
struct LowRank {
  const Packed* down;
  const Packed* up;
  float scales[kMaxParts];
};

// As `Addend` in low_rank.py.
struct AddendCall {
  const int32_t* rows;  // [rows]: numbers of adapters, or negative
  const LowRank* adapters;
  long count;
  const float* reduced;  // [rows, parts, width]
  long width;
};

struct ReduceCall {
  const void* x;  // [tokens, features]
  int x_dtype;
  long tokens, features;
  const int32_t* rows;  // [tokens], below count
  const LowRank* adapters;
  long count;
  float* out;  // [tokens, parts, width]
  long parts, width;
};

struct LinearCall {
  const Packed* weight;
  const void* x;  // [rows, in_features]
  int x_dtype;
  long rows;
  const float* bias;  // [out_features] or null
  Gate gate;          // not kNone: out is one matrix, activation(part 0) * part 1
  Outputs out;
  const AddendCall* addend = nullptr;
};

// Of a token's choices, those of experts [first_expert, first_expert + experts) are multiplied.
struct ExpertsCall {
  const Packed* const* gate_up;  // [experts]; null for those that no token chose
  const Packed* const* down;
  long experts, first_expert;
  const void* x;       // [tokens, features]
  const void* addend;  // the same, or null
  void* out;           // the same
  int dtype;
  long tokens, features, top_k;
  const int32_t* ids;   // [tokens, top_k]
  const float* shares;  // [tokens, top_k]
  Gate gate;
  const float* gate_up_bias;  // [experts, two parts side by side] or null
  const float* down_bias;     // [experts, features] or null
};

// As `Routing` in routing.py.
struct RoutingCall {
  const float* logits;  // [tokens, experts]
  const float* bias;    // [experts] or null
  int32_t* ids;         // [tokens, top_k]
  float* shares;        // [tokens, top_k]
  long tokens, experts, top_k, groups, top_groups;
  bool sigmoid, two_best, renormalize;
  double scale;
};

struct AttentionCall {
  void* out;          // [tokens, heads, value_size]
  const void* query;  // [tokens, heads, head_size]
  const void* cache;  // [num_blocks, 2, kv_heads, block_size, head_size], as kv_cache.cpp lays it out
  bool latent;      // the cache is [num_blocks, block_size, head_size], values being the first part of keys
  long value_size;  // head_size, unless latent
  int dtype;
  bool int8_cache;  // rounded to int8, with scales; else the cache is of dtype, too
  long tokens, heads, kv_heads, head_size, num_blocks, block_size;
  const int32_t* query_start;   // [sequences + 1]
  const int32_t* seq_lens;      // [sequences]
  const int32_t* block_tables;  // [sequences, table_stride]
  long sequences, table_stride;
  double scale, soft_cap;  // soft_cap 0: none
  long window;             // 0: none
  bool causal;
  long row_heads;  // in a row of query and of out, of which `heads` side by side belong to the call
  const float* sinks = nullptr;  // [heads] or null: the score of one more position, which has no value
};

struct RotaryCall {
  void* query;
  void* key;
  int dtype;
  long tokens, query_heads, key_heads, head_size;
  const int64_t* positions;
  const float* cos_sin;  // [max_position, rotary_size]
  long max_position, rotary_size;
  bool interleaved;
  long offset;  // of the first feature of a query's head that rotates; a key's heads have only what follows
};

struct WriteCall {
  const void* key;
  const void* value;
  void* cache;
  int dtype;
  bool int8_cache;
  long tokens, kv_heads, head_size, num_blocks, block_size;
  const int64_t* slots;
};

// The sum of `count` arrays of one dtype, added in their order (floats in float32, rounded once). `out` may be one.
using AddParts = void (*)(const void* const* parts, int count, void* out, int dtype, long items);

// Functions return null, or a sentence for ValueError.
struct Functions {
  const char* (*pack_rows)(const Packed& weight, int part, long first_row, const void* source, int dtype, long rows,
                           long stride);  // stride in elements
  const char* (*embedding)(const Packed& weight, const void* ids, bool wide, long count, long first_row, void* out);
  const char* (*linear)(const LinearCall& call);
  const char* (*reduce)(const ReduceCall& call);
  const char* (*experts)(const ExpertsCall& call);
  const char* (*rms_norm)(const void* x, const float* weight, void* out, int dtype, long rows, long features,
                          double eps);
  const char* (*add_rms_norm)(const void* x, void* residual, const float* weight, void* out, int dtype, long rows,
                              long features, double eps);
  const char* (*layer_norm)(const void* x, const float* weight, const float* bias, void* out, int dtype, long rows,
                            long features, double eps);
  const char* (*add_layer_norm)(const void* x, void* residual, const float* weight, const float* bias, void* out,
                                int dtype, long rows, long features, double eps);
  const char* (*activate)(const void* x, void* out, int dtype, long count, Activation kind);
  const char* (*gate_and_mul)(const void* gate, const void* up, void* out, int dtype, long count, Gate kind);
  const char* (*rotary)(const RotaryCall& call);
  const char* (*write_kv)(const WriteCall& call);
  const char* (*attention)(const AttentionCall& call);
  AddParts add_parts;
};

}  // namespace vllm_ms

namespace vllm_ms {

// Loading of small integers, the same for every instruction set (pack_integers.cpp). `stride` is in bytes; `zeros` and
// `addends` may be null.
void pack_integers(const Packed& weight, int part, long first_row, const int8_t* values, long rows, long stride);
void pack_scales(Packed& weight, int part, long first_row, const float* scales, const int8_t* zeros,
                 const int32_t* addends, long rows);

// Choice of experts, the same for every instruction set (routing.cpp).
const char* choose_experts(const RoutingCall& call);

// Rows of e4m3: value (i, j) times scales[i, (offset + j) / width].
struct Float8Rows {
  const uint8_t* values;
  long rows, columns, stride;
  const float* scales;  // [rows, scale_count]
  long scale_count, width, offset;
};

// To float32 [rows, columns]. NaN become numbers: the caller has looked for them.
void widen_float8(const Float8Rows& rows, float* to);

// Each row over its largest magnitude, times 127, to the nearest integer; times its scale it is the row again.
void round_rows(const float* values, long rows, long columns, int8_t* to, float* scales);

}  // namespace vllm_ms

// Declares the functions of one ISA's namespace; each of the kernel sources defines some of them.
#define VLLM_MS_DECLARE_KERNELS                                                                    \
  const char* pack_rows(const Packed&, int, long, const void*, int, long, long);                   \
  const char* embedding(const Packed&, const void*, bool, long, long, void*);                      \
  const char* linear(const LinearCall&);                                                           \
  const char* linear_integers(const LinearCall&);                                                  \
  const char* reduce(const ReduceCall&);                                                           \
  void add_low_rank(const LinearCall&, long, long, float*, long, long, long);                      \
  const char* experts(const ExpertsCall&);                                                         \
  const char* rms_norm(const void*, const float*, void*, int, long, long, double);                 \
  const char* add_rms_norm(const void*, void*, const float*, void*, int, long, long, double);      \
  const char* layer_norm(const void*, const float*, const float*, void*, int, long, long, double); \
  const char* add_layer_norm(const void*, void*, const float*, const float*, void*, int, long,     \
                             long, double);                                                        \
  const char* activate(const void*, void*, int, long, Activation);                                 \
  const char* gate_and_mul(const void*, const void*, void*, int, long, Gate);                      \
  const char* rotary(const RotaryCall&);                                                           \
  const char* write_kv(const WriteCall&);                                                          \
  const char* attention(const AttentionCall&);                                                     \
  void add_parts(const void* const*, int, void*, int, long);
