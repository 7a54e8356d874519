// The instructions of lane programs, for `width` samples side by side.
// Part of lanes_variant.h, which compiles it once for each instruction set.
#pragma once

#if FASTEBM_VECTOR == 16
typedef float Vector __attribute__((vector_size(64), aligned(4)));
#elif FASTEBM_VECTOR == 8
typedef float Vector __attribute__((vector_size(32), aligned(4)));
#else
typedef float Vector __attribute__((vector_size(16), aligned(4)));
#endif

static FASTEBM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static FASTEBM_INLINE Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
static FASTEBM_INLINE void store(float* at, Vector value) { *reinterpret_cast<Vector*>(at) = value; }
static FASTEBM_INLINE Vector spread(float value) {
#if FASTEBM_VECTOR == 16
  return _mm512_set1_ps(value);
#elif FASTEBM_VECTOR == 8
  return _mm256_set1_ps(value);
#else
  return Vector{value, value, value, value};
#endif
}
static FASTEBM_INLINE Vector fused_vector(Vector a, Vector b, Vector c) {
#if FASTEBM_VECTOR == 16
  return _mm512_fmadd_ps(a, b, c);
#elif FASTEBM_VECTOR == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < FASTEBM_VECTOR; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
#endif
}

static FASTEBM_INLINE int64_t address(const LaneProgram& program, int64_t table, int64_t i) {
  return table < 0 ? i : program.tables[table + i];
}

// ---- micro-operations on n numbers

#define FASTEBM_LOOP(EXPRESSION)                          \
  {                                                       \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; ++i) { \
      const float x = a[i];                               \
      d[i] = (EXPRESSION);                                \
    }                                                     \
    return;                                               \
  }
#define FASTEBM_LOOP2(EXPRESSION)                         \
  {                                                       \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; ++i) { \
      const float x = a[i], y = b[i];                     \
      d[i] = (EXPRESSION);                                \
    }                                                     \
    return;                                               \
  }
#define FASTEBM_LOOP3(EXPRESSION)                         \
  {                                                       \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; ++i) { \
      const float x = a[i], y = b[i], z = c[i];           \
      d[i] = (EXPRESSION);                                \
    }                                                     \
    return;                                               \
  }

static FASTEBM_INLINE float truth(bool value) { return value ? 1.0f : 0.0f; }

static FASTEBM_INLINE float remainder_of(float x, float y) {  // with the sign of y, as torch.remainder
  const float r = __builtin_fmodf(x, y);
  return r != 0 && ((r < 0) != (y < 0)) ? r + y : r;
}

static FASTEBM_INLINE float rounded_bfloat16(float x) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return x == x ? float_of(static_cast<int32_t>(rounded)) : x;
}

static void micro(LaneOp op, float* d, const float* a, const float* b, const float* c, float number, int64_t n) {
  switch (op) {
    case LaneOp::copy: FASTEBM_LOOP(x)
    case LaneOp::add: FASTEBM_LOOP2(x + y)
    case LaneOp::subtract: FASTEBM_LOOP2(x - y)
    case LaneOp::multiply: FASTEBM_LOOP2(x * y)
    case LaneOp::divide: FASTEBM_LOOP2(x / y)
    case LaneOp::negate: FASTEBM_LOOP(-x)
    case LaneOp::multiply_add: FASTEBM_LOOP3(fused(x, y, z))
    case LaneOp::add_number: FASTEBM_LOOP(x + number)
    case LaneOp::multiply_number: FASTEBM_LOOP(x * number)
    case LaneOp::number_minus: FASTEBM_LOOP(number - x)
    case LaneOp::number_over: FASTEBM_LOOP(number / x)
    case LaneOp::square: FASTEBM_LOOP(x * x)
    case LaneOp::reciprocal: FASTEBM_LOOP(1.0f / x)
    case LaneOp::square_root: FASTEBM_LOOP(rounded_sqrt(x))
    case LaneOp::reciprocal_root: FASTEBM_LOOP(1.0f / rounded_sqrt(x))
    case LaneOp::absolute: FASTEBM_LOOP(float_of(bits_of(x) & 0x7fffffff))
    case LaneOp::sign: FASTEBM_LOOP(x > 0 ? 1.0f : (x < 0 ? -1.0f : x * 0.0f))
    case LaneOp::floor: FASTEBM_LOOP(__builtin_floorf(x))
    case LaneOp::ceil: FASTEBM_LOOP(__builtin_ceilf(x))
    case LaneOp::round: FASTEBM_LOOP(__builtin_rintf(x))
    case LaneOp::truncate: FASTEBM_LOOP(__builtin_truncf(x))
    case LaneOp::exp: FASTEBM_LOOP(lane_exp(x))
    case LaneOp::expm1: FASTEBM_LOOP(lane_expm1(x))
    case LaneOp::log: FASTEBM_LOOP(lane_log(x))
    case LaneOp::log1p: FASTEBM_LOOP(lane_log1p(x))
    case LaneOp::sin: FASTEBM_LOOP(lane_sin(x))
    case LaneOp::cos: FASTEBM_LOOP(lane_cos(x))
    case LaneOp::tanh: FASTEBM_LOOP(lane_tanh(x))
    case LaneOp::sigmoid: FASTEBM_LOOP(lane_sigmoid(x))
    case LaneOp::softplus: FASTEBM_LOOP(lane_softplus(x))
    case LaneOp::erf: FASTEBM_LOOP(lane_erf(x))
    case LaneOp::atan: FASTEBM_LOOP(lane_atan(x))
    case LaneOp::atan2: FASTEBM_LOOP2(lane_atan2(x, y))
    case LaneOp::power: FASTEBM_LOOP2(lane_pow(x, y))
    case LaneOp::power_number: FASTEBM_LOOP(lane_pow(x, number))
    case LaneOp::silu: FASTEBM_LOOP(x * lane_sigmoid(x))
    case LaneOp::minimum: FASTEBM_LOOP2(x != x ? x : (x < y ? x : y))
    case LaneOp::maximum: FASTEBM_LOOP2(x != x ? x : (x > y ? x : y))
    case LaneOp::minimum_number: FASTEBM_LOOP(x > number ? number : x)
    case LaneOp::maximum_number: FASTEBM_LOOP(x < number ? number : x)
    case LaneOp::less: FASTEBM_LOOP2(truth(x < y))
    case LaneOp::less_equal: FASTEBM_LOOP2(truth(x <= y))
    case LaneOp::equal: FASTEBM_LOOP2(truth(x == y))
    case LaneOp::not_equal: FASTEBM_LOOP2(truth(x != y))
    case LaneOp::greater: FASTEBM_LOOP2(truth(x > y))
    case LaneOp::greater_equal: FASTEBM_LOOP2(truth(x >= y))
    case LaneOp::less_number: FASTEBM_LOOP(truth(x < number))
    case LaneOp::less_equal_number: FASTEBM_LOOP(truth(x <= number))
    case LaneOp::equal_number: FASTEBM_LOOP(truth(x == number))
    case LaneOp::not_equal_number: FASTEBM_LOOP(truth(x != number))
    case LaneOp::greater_number: FASTEBM_LOOP(truth(x > number))
    case LaneOp::greater_equal_number: FASTEBM_LOOP(truth(x >= number))
    case LaneOp::select: FASTEBM_LOOP3(x != 0 ? y : z)
    case LaneOp::logical_and: FASTEBM_LOOP2(truth(x != 0 && y != 0))
    case LaneOp::logical_or: FASTEBM_LOOP2(truth(x != 0 || y != 0))
    case LaneOp::logical_not: FASTEBM_LOOP(truth(x == 0))
    case LaneOp::is_nan: FASTEBM_LOOP(truth(x != x))
    case LaneOp::remainder: FASTEBM_LOOP2(remainder_of(x, y))
    case LaneOp::round_bfloat16: FASTEBM_LOOP(rounded_bfloat16(x))
    default: return;
  }
}

// ---- map

// Where `count` operand numbers from index `first` on are read: in place where they are consecutive in the arena.
static FASTEBM_INLINE const float* operand_at(const LaneProgram& program, const LaneOperand& operand, const float* arena,
                                              float* buffer, int64_t first, int64_t count, int64_t width) {
  if (operand.space == LaneSpace::arena) {
    if (operand.table < 0) return arena + (operand.base + first) * width;
    const int32_t* table = program.tables + operand.table + first;
    const float* base = arena + operand.base * width;
    if (width == 1) {
      for (int64_t i = 0; i < count; ++i) buffer[i] = base[table[i]];
      return buffer;
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* __restrict from = base + table[i] * width;
      float* __restrict to = buffer + i * width;
      for (int64_t l = 0; l < width; ++l) to[l] = from[l];
    }
    return buffer;
  }
  const float* base = program.constants + operand.base;
  if (operand.space == LaneSpace::number) {
    for (int64_t i = 0; i < count * width; ++i) buffer[i] = base[0];
    return buffer;
  }
  if (width == 1 && operand.table < 0) return base + first;
  for (int64_t i = 0; i < count; ++i) {
    const float value = base[address(program, operand.table, first + i)];
    float* __restrict to = buffer + i * width;
    for (int64_t l = 0; l < width; ++l) to[l] = value;
  }
  return buffer;
}

static FASTEBM_INLINE void accumulate(LaneOutput kind, float* __restrict sum, const float* __restrict value, int64_t width) {
  switch (kind) {
    case LaneOutput::sum:
      for (int64_t l = 0; l < width; ++l) sum[l] += value[l];
      return;
    case LaneOutput::maximum:
      for (int64_t l = 0; l < width; ++l) sum[l] = sum[l] != sum[l] ? sum[l] : (sum[l] > value[l] ? sum[l] : value[l]);
      return;
    case LaneOutput::minimum:
      for (int64_t l = 0; l < width; ++l) sum[l] = sum[l] != sum[l] ? sum[l] : (sum[l] < value[l] ? sum[l] : value[l]);
      return;
    default:
      for (int64_t l = 0; l < width; ++l) sum[l] *= value[l];
  }
}

// Rows of `inner` numbers are reduced into one each. The element j of a row goes to the partial result j % kPartials, and these
// are combined in halves.
static void reduce(const LaneProgram& program, const LaneOutputRow& output, float* arena, const float* values, float* partials,
                   int64_t first, int64_t count, int64_t inner, int64_t width) {
  const int64_t used = least(inner, kPartials);
  int64_t row = first / inner, j = first % inner;
  for (int64_t i = 0; i < count;) {
    const float* value = values + i * width;
    float* partial = partials + j % kPartials * width;
    if (j < used)
      for (int64_t l = 0; l < width; ++l) partial[l] = value[l];
    else
      accumulate(output.kind, partial, value, width);
    ++i;
    if (++j < inner) continue;
    float* out = arena + (output.base + address(program, output.table, row)) * width;
    for (int64_t left = used; left > 1;) {
      const int64_t half = (left + 1) / 2;
      for (int64_t p = 0; p + half < left; ++p) accumulate(output.kind, partials + p * width, partials + (p + half) * width, width);
      left = half;
    }
    for (int64_t l = 0; l < width; ++l) out[l] = partials[l];
    j = 0;
    ++row;
  }
}

static void run_map(const LaneProgram& program, const LaneInstruction& instruction, float* arena, float* scratch, int64_t width) {
  const int64_t total = instruction.outer * instruction.inner, strip = kStrip / width;
  const LaneOperand* operands = program.operands + instruction.first_operand;
  const LaneMicro* micros = program.micros + instruction.first_micro;
  const LaneOutputRow* outputs = program.outputs + instruction.first_output;
  const float* registers[kMaxRegisters];
  if (instruction.micros == 1 && instruction.operands == 1 && instruction.outputs == 1 && micros[0].op == LaneOp::copy &&
      micros[0].a == 0 && program.direct[instruction.first_micro] >= 0) {  // numbers are only moved: straight to their places
    float* to = arena + outputs[0].base * width;
    const float* from = operand_at(program, operands[0], arena, to, 0, total, width);
    if (from != to)
      for (int64_t i = 0; i < total * width; ++i) to[i] = from[i];
    return;
  }
  for (int64_t first = 0; first < total; first += strip) {
    const int64_t count = least(strip, total - first), n = count * width;
    for (int64_t r = 0; r < instruction.operands; ++r) {
      if (operands[r].space == LaneSpace::number && first > 0 && n <= kStrip) continue;  // filled by the first strip
      registers[r] = operand_at(program, operands[r], arena, scratch + r * kStrip, first, count, width);
    }
    for (int64_t m = 0; m < instruction.micros; ++m) {
      const LaneMicro& step = micros[m];
      const int64_t direct = program.direct[instruction.first_micro + m];
      float* target = direct < 0 ? scratch + step.target * kStrip : arena + (program.outputs[direct].base + first) * width;
      micro(step.op, target, registers[step.a], registers[step.b], registers[step.c], float_of(static_cast<int32_t>(step.number)), n);
      registers[step.target] = target;
    }
    int64_t reduction = 0;
    for (int64_t o = 0; o < instruction.outputs; ++o) {
      const LaneOutputRow& output = outputs[o];
      const float* values = registers[output.source];
      if (output.kind != LaneOutput::store) {
        reduce(program, output, arena, values, scratch + kMaxRegisters * kStrip + reduction++ * kPartials * kMaxWidth, first, count, instruction.inner, width);
        continue;
      }
      if (output.table < 0) {
        float* to = arena + (output.base + first) * width;
        if (to != values)
          for (int64_t i = 0; i < n; ++i) to[i] = values[i];
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        float* __restrict to = arena + (output.base + program.tables[output.table + first + i]) * width;
        const float* __restrict from = values + i * width;
        for (int64_t l = 0; l < width; ++l) to[l] = from[l];
      }
    }
  }
}

// ---- products with a constant matrix

// Accumulators of a tile: as many as the registers hold beside what a step reads, and enough to hide the latency of each.
constexpr int kAccumulators = FASTEBM_VECTOR == 16 ? 16 : FASTEBM_VECTOR == 8 ? 12 : 8;
constexpr int kWhole = FASTEBM_VECTOR == 16 ? 8 : 4;
// The largest depth of a block: the numbers of a tile's lanes stay in L1 beside the weights of a panel.
constexpr int64_t kDepth = 128;

// Tiles of a product: each has `rows` x `outputs` sums for `vectors` vectors of lanes.
struct ProductTile {
  const float* x[4];       // of the rows
  const int64_t* offsets;  // of the depth
  const float* weight;
  const float* next;  // weights that are read after these: fetched meanwhile, since hardware doesn't see the jump to them
  const float* bias;
  float* out[4][kLanePanel];
  int64_t depth;
  bool first;
};

template <int rows, int outputs, int vectors>
static FASTEBM_INLINE void product_tile(const ProductTile& t, int64_t row, int column, int64_t lane) {
  Vector sums[rows][outputs][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int o = 0; o < outputs; ++o)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sums[r][o][v] = t.first ? spread(t.bias ? t.bias[column + o] : 0.0f) : load(t.out[row + r][column + o] + lane + v * FASTEBM_VECTOR);
  const float* x[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) x[r] = t.x[row + r] + lane;
  const int64_t *offsets = t.offsets, depth = t.depth;
  const float* weight = t.weight + column;
  const float* ahead = column == 0 && lane == 0 ? t.next : weight;
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead + k * kLanePanel, 0, 2);
    const int64_t at = offsets[k];
    Vector values[rows][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) values[r][v] = load(x[r] + at + v * FASTEBM_VECTOR);
#pragma GCC unroll 16
    for (int o = 0; o < outputs; ++o) {
      const Vector w = spread(weight[k * kLanePanel + o]);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][o][v] = fused_vector(w, values[r][v], sums[r][o][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int o = 0; o < outputs; ++o)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) store(t.out[row + r][column + o] + lane + v * FASTEBM_VECTOR, sums[r][o][v]);
}

// Whole tiles of one row, which are multiples of kWhole outputs: as many as fill the accumulators, and of kWhole what is left. Lanes
// are the outer loop: numbers and weights of so few of them stay in L1 meanwhile.
template <int vectors>
static FASTEBM_INLINE void product_columns(const ProductTile& t, int64_t row, int columns, int64_t lane) {
  constexpr int outputs = kAccumulators / vectors, together = outputs % kWhole == 0 ? outputs : 2 * outputs;
  int column = 0;
  for (; column + together <= columns; column += together)
#pragma GCC unroll 2
    for (int o = 0; o < together; o += outputs) product_tile<1, outputs, vectors>(t, row, column + o, lane);
  if constexpr (together != kWhole)
    for (; column < columns; column += kWhole) product_tile<1, kWhole, vectors>(t, row, column, lane);
}

template <int rows, int outputs>
static FASTEBM_INLINE void product_lanes(const ProductTile& t, int column, int64_t width) {
  constexpr int fill = kAccumulators / (rows * outputs), most = fill >= 4 ? 4 : fill >= 2 ? 2 : 1;
  int64_t lane = 0;
  for (; lane + most * FASTEBM_VECTOR <= width; lane += most * FASTEBM_VECTOR)
    product_tile<rows, outputs, most>(t, 0, column, lane);
  if constexpr (most > 2)
    for (; lane + 2 * FASTEBM_VECTOR <= width; lane += 2 * FASTEBM_VECTOR) product_tile<rows, outputs, 2>(t, 0, column, lane);
  if constexpr (most > 1)
    for (; lane < width; lane += FASTEBM_VECTOR) product_tile<rows, outputs, 1>(t, 0, column, lane);
}

// The last columns of a panel, fewer than fill the accumulators.
template <int rows>
static FASTEBM_INLINE void product_rest(const ProductTile& t, int column, int columns, int64_t width) {
  for (; column + 4 <= columns; column += 4) product_lanes<rows, 4>(t, column, width);
  for (; column < columns; ++column) product_lanes<rows, 1>(t, column, width);
}

// One sample: vectors run over the columns of panels; several panels, or rows, at a time hide the latency of each other's sums.
template <int rows, int panels>
static FASTEBM_INLINE void product_panels(const LaneProgram& program, const LaneInstruction& instruction, float* arena, int64_t row,
                                          int64_t column) {
  constexpr int kPanelVectors = kLanePanel / FASTEBM_VECTOR;
  constexpr int64_t kAhead = 32;  // weights come from far: the hardware alone does not fetch so many streams in time
  const int64_t depth = instruction.depth, columns = least(panels * kLanePanel, instruction.columns - column);
  const float* weight = program.constants + instruction.weight + column * depth;
  const int32_t* table = instruction.k_table < 0 ? nullptr : program.tables + instruction.k_table;
  const float* x[rows];
  float sums[panels * kLanePanel];
  Vector total[rows][panels][kPanelVectors];
  for (int64_t c = 0; c < panels * kLanePanel; ++c)
    sums[c] = instruction.bias < 0 || c >= columns ? 0.0f : program.constants[instruction.bias + column + c];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    x[r] = arena + instruction.source + address(program, instruction.row_table, row + r);
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) total[r][p][v] = load(sums + p * kLanePanel + v * FASTEBM_VECTOR);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = table ? table[k] : k;
    if constexpr (rows == 1) {
#pragma GCC unroll 8
      for (int p = 0; p < panels; ++p) __builtin_prefetch(weight + (p * depth + k + kAhead) * kLanePanel, 0, 3);
    }
    Vector values[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) values[r] = spread(x[r][at]);
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        const Vector w = load(weight + (p * depth + k) * kLanePanel + v * FASTEBM_VECTOR);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) total[r][p][v] = fused_vector(w, values[r], total[r][p][v]);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) store(sums + p * kLanePanel + v * FASTEBM_VECTOR, total[r][p][v]);
    float* out = arena + instruction.target + address(program, instruction.target_row_table, row + r);
    for (int64_t c = 0; c < columns; ++c) out[address(program, instruction.target_column_table, column + c)] = sums[c];
  }
}

static void product_one(const LaneProgram& program, const LaneInstruction& instruction, float* arena) {
  constexpr int kTogether = FASTEBM_VECTOR / 2;  // panels, or rows: as many sums as the registers hold
  for (int64_t row = 0; row < instruction.rows;) {
    const bool many = instruction.rows - row >= kTogether;
    int64_t column = 0;
    if (!many)
      for (; column + (kTogether - 1) * kLanePanel < instruction.columns; column += kTogether * kLanePanel)
        product_panels<1, kTogether>(program, instruction, arena, row, column);
    for (; column < instruction.columns; column += kLanePanel) {
      if (many) product_panels<kTogether, 1>(program, instruction, arena, row, column);
      else product_panels<1, 1>(program, instruction, arena, row, column);
    }
    row += many ? kTogether : 1;
  }
}

static void run_product(const LaneProgram& program, const LaneInstruction& instruction, float* arena, int64_t width) {
  if (width == 1) return product_one(program, instruction, arena);
  const float* weight = program.constants + instruction.weight;
  const float* bias = instruction.bias < 0 ? nullptr : program.constants + instruction.bias;
  int64_t offsets[kDepth];
  ProductTile tile;
  tile.offsets = offsets;
  const int64_t blocks = (instruction.depth + kDepth - 1) / kDepth, most = (instruction.depth + blocks - 1) / blocks;
  for (int64_t begin = 0; begin < instruction.depth; begin += most) {
    tile.first = begin == 0;
    tile.depth = least(most, instruction.depth - begin);
    for (int64_t k = 0; k < tile.depth; ++k) offsets[k] = address(program, instruction.k_table, begin + k) * width;
    for (int64_t row = 0; row < instruction.rows;) {
      const int64_t rows = instruction.rows - row >= 4 ? 4 : 1;
      for (int64_t r = 0; r < rows; ++r)
        tile.x[r] = arena + (instruction.source + address(program, instruction.row_table, row + r)) * width;
      for (int64_t column = 0; column < instruction.columns; column += kLanePanel) {
        const int columns = static_cast<int>(least(kLanePanel, instruction.columns - column));
        tile.weight = weight + column * instruction.depth + begin * kLanePanel;
        const bool last = column + kLanePanel >= instruction.columns;
        tile.next = !last                                    ? tile.weight + kLanePanel * instruction.depth
                    : begin + 2 * most <= instruction.depth ? weight + (begin + most) * kLanePanel
                                                            : tile.weight;
        tile.bias = bias ? bias + column : nullptr;
        for (int64_t r = 0; r < rows; ++r) {
          float* target = arena + (instruction.target + address(program, instruction.target_row_table, row + r)) * width;
          for (int c = 0; c < columns; ++c) tile.out[r][c] = target + address(program, instruction.target_column_table, column + c) * width;
        }
        // Whole tiles row by row; what is left of the columns for several rows together.
        const int whole = columns / kWhole * kWhole;
        for (int64_t r = 0; r < rows && whole > 0; ++r) {
          int64_t lane = 0;
          for (; lane + 2 * FASTEBM_VECTOR <= width; lane += 2 * FASTEBM_VECTOR) product_columns<2>(tile, r, whole, lane);
          if constexpr (2 * FASTEBM_VECTOR > kLaneGroup)
            if (lane < width) product_columns<1>(tile, r, whole, lane);
        }
        if (whole == columns) continue;
        if (rows == 4) product_rest<4>(tile, whole, columns, width);
        else product_rest<1>(tile, whole, columns, width);
      }
      row += rows;
    }
  }
}

// ---- products of two matrices of each sample

template <int columns>
static FASTEBM_INLINE void pair_tile(const LaneProgram& program, const LaneInstruction& instruction, const float* left,
                                     const float* right, const int64_t* offsets, float* const* out, int64_t width) {
  int64_t lane = 0;
  for (; lane + FASTEBM_VECTOR <= width; lane += FASTEBM_VECTOR) {
    Vector sums[columns];
    for (int c = 0; c < columns; ++c) sums[c] = spread(0.0f);
    for (int64_t k = 0; k < instruction.depth; ++k) {
      const Vector a = load(left + address(program, instruction.k_table, k) * width + lane);
      const float* b = right + address(program, instruction.other_k_table, k) * width + lane;
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) sums[c] = fused_vector(a, load(b + offsets[c] * width), sums[c]);
    }
    for (int c = 0; c < columns; ++c) store(out[c] + lane, sums[c]);
  }
  for (; lane < width; ++lane)
    for (int c = 0; c < columns; ++c) {
      float sum = 0.0f;
      for (int64_t k = 0; k < instruction.depth; ++k)
        sum = fused(left[address(program, instruction.k_table, k) * width + lane],
                    right[(address(program, instruction.other_k_table, k) + offsets[c]) * width + lane], sum);
      out[c][lane] = sum;
    }
}

static void run_pair_product(const LaneProgram& program, const LaneInstruction& instruction, float* arena, int64_t width) {
  for (int64_t b = 0; b < instruction.batch; ++b)
    for (int64_t i = 0; i < instruction.rows; ++i) {
      const int64_t row = b * instruction.rows + i;
      const float* left = arena + (instruction.source + address(program, instruction.row_table, row)) * width;
      for (int64_t j = 0; j < instruction.columns;) {
        int64_t offsets[4];
        float* out[4];
        const int64_t count = instruction.columns - j >= 4 ? 4 : 1;
        for (int64_t c = 0; c < count; ++c) {
          offsets[c] = address(program, instruction.other_table, b * instruction.columns + j + c);
          out[c] = arena +
                   (instruction.target + address(program, instruction.target_row_table, row * instruction.columns + j + c)) * width;
        }
        const float* right = arena + instruction.other * width;
        if (count == 4) pair_tile<4>(program, instruction, left, right, offsets, out, width);
        else pair_tile<1>(program, instruction, left, right, offsets, out, width);
        j += count;
      }
    }
}

static void run_scan(const LaneProgram& program, const LaneInstruction& instruction, float* arena, int64_t width) {
  const LaneOperand& operand = program.operands[instruction.first_operand];
  for (int64_t row = 0; row < instruction.outer; ++row) {
    const float* before = nullptr;
    for (int64_t j = 0; j < instruction.inner; ++j) {
      const int64_t i = row * instruction.inner + j;
      const float* value = arena + (operand.base + address(program, operand.table, i)) * width;
      float* out = arena + (instruction.target + address(program, instruction.target_row_table, i)) * width;
      for (int64_t l = 0; l < width; ++l) out[l] = before ? before[l] + value[l] : value[l];
      before = out;
    }
  }
}

static void run(const LaneProgram& program, float* arena, int64_t width) {
  float* scratch = arena + program.header->arena * width;
  for (int64_t i = 0; i < program.header->instructions; ++i) {
    const LaneInstruction& instruction = program.instructions[i];
    switch (instruction.kind) {
      case LaneKind::map: run_map(program, instruction, arena, scratch, width); break;
      case LaneKind::product: run_product(program, instruction, arena, width); break;
      case LaneKind::pair_product: run_pair_product(program, instruction, arena, width); break;
      default: run_scan(program, instruction, arena, width);
    }
  }
}

// ---- the update

// Bits of Philox for 16 counters; word w of counter i is bits[w][i]. `quads` are the first words, `low` and `high` the ids.
#if FASTEBM_VECTOR == 16
template <int groups>
static FASTEBM_INLINE void draw_bits(uint32_t (*bits)[4][16], const __m512i* quads, const __m512i* low, const __m512i* high,
                                     const LaneUpdate& update) {
  // Each 64-bit lane holds a counter in its lower half: even counters in one register, odd ones in the other.
  const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53u), multiplier1 = _mm512_set1_epi64(0xCD9E8D57u);
  constexpr int count = 2 * groups;
  __m512i c0[count], c1[count], c2[count], c3[count];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g)
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const int i = 2 * g + odd;
      c0[i] = odd ? _mm512_srli_epi64(quads[g], 32) : quads[g];
      c1[i] = _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(update.step)));
      c2[i] = odd ? _mm512_srli_epi64(low[g], 32) : low[g];
      c3[i] = odd ? _mm512_srli_epi64(high[g], 32) : high[g];
    }
  uint32_t k0 = static_cast<uint32_t>(update.seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(update.seed) >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const __m512i product0 = _mm512_mul_epu32(c0[i], multiplier0), product1 = _mm512_mul_epu32(c2[i], multiplier1);
      c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[i], key0, 0x96);
      c1[i] = product1;
      c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[i], key1, 0x96);
      c3[i] = product0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    const __m512i* words[4] = {c0 + 2 * g, c1 + 2 * g, c2 + 2 * g, c3 + 2 * g};
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word)
      _mm512_store_si512(bits[g][word], _mm512_mask_shuffle_epi32(words[word][0], 0xAAAA, words[word][1], _MM_PERM_CDAB));
  }
}
#elif FASTEBM_VECTOR == 8
template <int groups>
static FASTEBM_INLINE void draw_bits(uint32_t (*bits)[4][16], const __m256i* quads, const __m256i* low, const __m256i* high,
                                     const LaneUpdate& update) {
  const __m256i multiplier0 = _mm256_set1_epi64x(0xD2511F53u), multiplier1 = _mm256_set1_epi64x(0xCD9E8D57u);
  for (int part = 0; part < 2 * groups; ++part) {
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int odd = 0; odd < 2; ++odd) {
      c0[odd] = odd ? _mm256_srli_epi64(quads[part], 32) : quads[part];
      c1[odd] = _mm256_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(update.step)));
      c2[odd] = odd ? _mm256_srli_epi64(low[part], 32) : low[part];
      c3[odd] = odd ? _mm256_srli_epi64(high[part], 32) : high[part];
    }
    uint32_t k0 = static_cast<uint32_t>(update.seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(update.seed) >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      for (int odd = 0; odd < 2; ++odd) {
        const __m256i product0 = _mm256_mul_epu32(c0[odd], multiplier0), product1 = _mm256_mul_epu32(c2[odd], multiplier1);
        c0[odd] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), key0), c1[odd]);
        c1[odd] = product1;
        c2[odd] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), key1), c3[odd]);
        c3[odd] = product0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const __m256i* words[4] = {c0, c1, c2, c3};
    for (int word = 0; word < 4; ++word)
      _mm256_store_si256(reinterpret_cast<__m256i*>(bits[part / 2][word] + part % 2 * 8),
                         _mm256_blend_epi32(words[word][0], _mm256_slli_epi64(words[word][1], 32), 0xAA));
  }
}
#endif

// Bits of 16 x groups counters, whose first words are quad + stride * i.
template <int groups>
static FASTEBM_INLINE void draw_group(uint32_t (*bits)[4][16], uint32_t quad, uint32_t stride, int64_t lane,
                                      const LaneUpdate& update) {
#if FASTEBM_VECTOR >= 8
  alignas(64) uint32_t first[16 * groups];
  for (int i = 0; i < 16 * groups; ++i) first[i] = quad + stride * static_cast<uint32_t>(i);
#if FASTEBM_VECTOR == 16
  __m512i quads[groups], low[groups], high[groups];
  for (int g = 0; g < groups; ++g) {
    quads[g] = _mm512_load_si512(first + 16 * g);
    low[g] = _mm512_loadu_si512(update.ids_low + lane + 16 * g);
    high[g] = _mm512_loadu_si512(update.ids_high + lane + 16 * g);
  }
#else
  __m256i quads[2 * groups], low[2 * groups], high[2 * groups];
  for (int g = 0; g < 2 * groups; ++g) {
    quads[g] = _mm256_load_si256(reinterpret_cast<const __m256i*>(first + 8 * g));
    low[g] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(update.ids_low + lane + 8 * g));
    high[g] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(update.ids_high + lane + 8 * g));
  }
#endif
  draw_bits<groups>(bits, quads, low, high, update);
#else
  for (int i = 0; i < 16 * groups; ++i) {
    const NoiseAddress at{static_cast<uint32_t>(update.seed), static_cast<uint32_t>(static_cast<uint64_t>(update.seed) >> 32),
                          static_cast<uint32_t>(update.step), update.ids_low[lane + i], update.ids_high[lane + i]};
    const Quad drawn = philox(quad + stride * static_cast<uint32_t>(i), at);
    for (int word = 0; word < 4; ++word) bits[i / 16][word][i % 16] = drawn.lane[word];
  }
#endif
}

static FASTEBM_INLINE void pairs_of(float* __restrict first, float* __restrict second, const uint32_t* __restrict radius,
                                    const uint32_t* __restrict angle) {
#pragma GCC ivdep
  for (int i = 0; i < 16; ++i) normal_pair(radius[i], angle[i], first[i], second[i]);
}

// Normals for `count` <= 4 elements from 4 * quad on of 16 x groups chains. out is (4, width).
template <int groups>
static FASTEBM_INLINE void draw_lanes(float* out, uint32_t quad, int64_t count, const LaneUpdate& update, int64_t lane,
                                      int64_t width) {
  alignas(64) uint32_t bits[groups][4][16];
  draw_group<groups>(bits, quad, 0, lane, update);
  for (int g = 0; g < groups; ++g) {
    float* to = out + lane + 16 * g;
    pairs_of(to, to + width, bits[g][0], bits[g][1]);
    if (count > 2) pairs_of(to + 2 * width, to + 3 * width, bits[g][2], bits[g][3]);
  }
}

// Normals for the 64 elements from 4 * quad on of a single chain.
static FASTEBM_INLINE void draw_elements(float* out, uint32_t quad, const LaneUpdate& update) {
  alignas(64) uint32_t bits[1][4][16];
  alignas(64) float drawn[4][16];
  draw_group<1>(bits, quad, 1, 0, update);
  pairs_of(drawn[0], drawn[1], bits[0][0], bits[0][1]);
  pairs_of(drawn[2], drawn[3], bits[0][2], bits[0][3]);
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 4; ++k) out[4 * i + k] = drawn[k][i];
}

static FASTEBM_INLINE float bounded_by(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// The sum of the squares of each lane's numbers, or of their distances from `other`, in the first row of update.sums: the sums
// e % kFoldLanes of langevin.cpp are leaves of a tree, which is walked from the left with one row for each level.
static void sum_squares(const float* values, const float* other, int64_t sample, int64_t width, const LaneUpdate& update) {
  int64_t leaves = 1, level_of = 0;
  while (leaves < sample && leaves < kFoldLanes) leaves *= 2, ++level_of;
  float* rows = update.sums;
  int64_t filled = 0;
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    int64_t first = 0;  // the leaf's number with its bits in reverse
    for (int64_t b = 0; b < level_of; ++b) first |= (leaf >> b & 1) << (level_of - 1 - b);
    float* __restrict sum = rows + filled++ * width;
    for (int64_t l = 0; l < width; ++l) sum[l] = 0.0f;
    for (int64_t e = first; e < sample; e += kFoldLanes) {
      const float* __restrict a = values + e * width;
      if (other) {
        const float* __restrict b = other + e * width;
        for (int64_t l = 0; l < width; ++l) {
          const float d = a[l] - b[l];
          sum[l] = fused(d, d, sum[l]);
        }
      } else {
        for (int64_t l = 0; l < width; ++l) sum[l] = fused(a[l], a[l], sum[l]);
      }
    }
    for (int64_t done = leaf + 1; done % 2 == 0; done /= 2) {
      float* __restrict left = rows + (filled - 2) * width;
      const float* __restrict right = rows + (filled - 1) * width;
      for (int64_t l = 0; l < width; ++l) left[l] += right[l];
      --filled;
    }
  }
}

// The scale of each chain's gradient and the weight of its data term.
static void chain_factors(const float* x, const float* gradient, int64_t sample, int64_t width, const LaneUpdate& update) {
  const int64_t row = width == 1 ? kLaneRow : width;
  if (update.clips_norm) {
    sum_squares(gradient, nullptr, sample, width, update);
    for (int64_t l = 0; l < width; ++l) {
      const float norm = rounded_sqrt(update.sums[l]);
      update.scale[l] = norm > update.grad_norm_clip ? update.grad_norm_clip / norm : 1.0f;
    }
    if (width == 1)
      for (int64_t l = 1; l < row; ++l) update.scale[l] = update.scale[0];
  }
  if (!update.pulls) return;
  const bool hinged = update.data_term_hinge > 0;
  if (hinged) sum_squares(x, update.target, sample, width, update);
  for (int64_t l = 0; l < row; ++l)
    update.weight[l] = hinged && !(update.sums[width == 1 ? 0 : l] > update.data_term_hinge) ? 0.0f : update.data_term_weight;
}

// The gradient of n numbers from place `at` on, clipped, plus that of the data term.
static FASTEBM_INLINE const float* drift_of(const float* g, const float* x, int64_t at, int64_t n, const LaneUpdate& update) {
  float* drift = update.drift;
  if (update.clips) {
    const float limit = update.grad_clip;
#pragma GCC ivdep
    for (int64_t l = 0; l < n; ++l) drift[l] = bounded_by(g[l], -limit, limit);
    g = drift;
  }
  if (update.clips_norm) {
#pragma GCC ivdep
    for (int64_t l = 0; l < n; ++l) drift[l] = g[l] * update.scale[l];
    g = drift;
  }
  if (update.pulls) {
    const float *target = update.target + at, *weight = update.weight;
#pragma GCC ivdep
    for (int64_t l = 0; l < n; ++l) {
      const float pulled = fused(weight[l], x[l] - target[l], g[l]);
      drift[l] = weight[l] != 0 ? pulled : g[l];
    }
    g = drift;
  }
  return g;
}

static FASTEBM_INLINE void bound(float* __restrict x, int64_t at, int64_t n, const LaneUpdate& update) {
  if (update.clamps)
    for (int64_t l = 0; l < n; ++l) x[l] = bounded_by(x[l], update.clamp_min, update.clamp_max);
  if (update.lower) {
    const float* __restrict low = update.lower + at;
    for (int64_t l = 0; l < n; ++l) x[l] = x[l] < low[l] ? low[l] : x[l];
  }
  if (update.upper) {
    const float* __restrict high = update.upper + at;
    for (int64_t l = 0; l < n; ++l) x[l] = x[l] > high[l] ? high[l] : x[l];
  }
  if (update.mask) {
    const float *__restrict mask = update.mask + at, *__restrict known = update.known + at;
    for (int64_t l = 0; l < n; ++l) x[l] = mask[l] != 0 ? known[l] : x[l];
  }
}

// The noise of the elements from e on: 4 rows, or one row of a single chain.
static FASTEBM_INLINE void draw_rows(int64_t e, int64_t sample, int64_t width, const LaneUpdate& update) {
  const auto quad = static_cast<uint32_t>(e / 4);
  if (width == 1) return draw_elements(update.noise, quad, update);
  const int64_t count = least(4, sample - e);
  int64_t lane = 0;
  for (; lane + 32 <= width; lane += 32) draw_lanes<2>(update.noise, quad, count, update, lane, width);
  if (lane < width) draw_lanes<1>(update.noise, quad, count, update, lane, width);
}

static void update(const LaneProgram& program, float* arena, int64_t width, const LaneUpdate& update) {
  const int64_t sample = program.header->sample;
  const float* gradient = arena + program.header->gradient * width;
  const bool plain = !update.clips && !update.clips_norm && !update.pulls;
  if (update.drifts && (update.clips_norm || update.pulls)) chain_factors(arena, gradient, sample, width, update);
  // A row is one element of all chains, or kLaneRow elements of one chain.
  const int64_t row = width == 1 ? kLaneRow : width, step = width == 1 ? kLaneRow : 4, rows = width == 1 ? 1 : 4;
  for (int64_t e = 0; e < sample; e += step) {
    if (update.noisy) draw_rows(e, sample, width, update);
    for (int64_t r = 0; r < rows && e + r < sample; ++r) {
      const int64_t at = (e + r) * width, n = least(row, sample * width - at);
      float* __restrict x = arena + at;
      if (!update.drifts) {
        const float *__restrict sigma = update.noise_std, *__restrict xi = update.noise + r * row;
        for (int64_t l = 0; l < n && update.noisy; ++l) x[l] = sigma[l] != 0 ? fused(sigma[l], xi[l], x[l]) : x[l];
        bound(x, at, n, update);
        continue;
      }
      const float* g = plain ? gradient + at : drift_of(gradient + at, x, at, n, update);
      const float *__restrict eta = update.step_size, *__restrict sigma = update.noise_std, *__restrict xi = update.noise + r * row;
      if (update.every_noisy) {
#pragma GCC ivdep
        for (int64_t l = 0; l < n; ++l) x[l] = fused(sigma[l], xi[l], fused(-eta[l], g[l], x[l]));
      } else if (update.noisy) {
#pragma GCC ivdep
        for (int64_t l = 0; l < n; ++l) {
          const float moved = fused(-eta[l], g[l], x[l]), noisy = fused(sigma[l], xi[l], moved);
          x[l] = sigma[l] != 0 ? noisy : moved;
        }
      } else {
#pragma GCC ivdep
        for (int64_t l = 0; l < n; ++l) x[l] = fused(-eta[l], g[l], x[l]);
      }
      bound(x, at, n, update);
    }
  }
}
