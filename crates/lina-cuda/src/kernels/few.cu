// Products of a step's few rows with the experts that they chose, or with one matrix. What bounds them is how fast a
// matrix is read, once: blocks have some of its rows, which are columns of the result, for all rows of the step that go
// there.

constexpr u32 MAX_ROWS = 64;
constexpr u32 NOBODY = 0xffffffffu;
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr u32 WARPS = 4;
constexpr u32 BLOCK = WARPS * WARP;

enum Operation : u32 {
    // Of tokens with gates and ups, whose SwiGLU is the result.
    SWIGLU,
    // Of tokens, followed by an activation.
    PLAIN,
    // Of choices.
    ROWS,
};

// What a launch computes: `out` `[choices, outputs]`. An expert's matrix has as many rows, with SwiGLU twice as many, of
// `depth` elements; matrices start `stride` elements apart. Without an index all choices are of the one matrix.
template <class T> struct Step {
    const u32* index;
    const u32* slots;
    const T* x;
    const T* weights;
    T* out;
    // Of rows: what is added to them, if anything.
    const T* addend;
    u64 stride;
    u32 choices, top_k, experts, outputs, depth, kind;
    // Of rows: `out` is of floats.
    u32 wide;
};

// Lists the choices that went to an expert, in ascending order: a token has at most one of them. Gives their number.
__device__ __forceinline__ u32 list_choices(const u32* index, u32 choices, u32 top_k, u32 expert, u32* list) {
    __shared__ u32 choice_of[MAX_ROWS];
    if (threadIdx.x < MAX_ROWS) choice_of[threadIdx.x] = NOBODY;
    __syncthreads();
    for (u32 choice = threadIdx.x; choice < choices; choice += BLOCK) {
        if (index[choice] == expert) choice_of[choice / top_k] = choice;
    }
    __syncthreads();
    const u32 lane = threadIdx.x % WARP;
    const u32 first = choice_of[lane], second = choice_of[lane + WARP];
    const u32 firsts = __ballot_sync(ALL_LANES, first != NOBODY), seconds = __ballot_sync(ALL_LANES, second != NOBODY);
    if (threadIdx.x < WARP) {
        const u32 before = (1u << lane) - 1;
        if (first != NOBODY) list[__popc(firsts & before)] = first;
        if (second != NOBODY) list[__popc(firsts) + __popc(seconds & before)] = second;
    }
    __syncthreads();
    return __popc(firsts) + __popc(seconds);
}

// The expert of this block: its matrix and the choices that went to it. None of them where the block has nothing to do.
// There is a block for each expert or, where they are fewer, for each choice: the first one of an expert counts.
template <class T> __device__ __forceinline__ u32 take_expert(const Step<T>& step, u32* list, const T*& matrix) {
    if (!step.index) {
        if (threadIdx.x < step.choices) list[threadIdx.x] = threadIdx.x;
        __syncthreads();
        matrix = step.weights;
        return step.choices;
    }
    const bool by_choice = step.choices <= step.experts;
    const u32 expert = by_choice ? step.index[blockIdx.y] : blockIdx.y;
    matrix = step.weights + step.slots[expert] * step.stride;
    const u32 rows = list_choices(step.index, step.choices, step.top_k, expert, list);
    return by_choice && list[0] != blockIdx.y ? 0 : rows;
}

// The row of `x` that a choice multiplies.
template <u32 OPERATION, class T> __device__ __forceinline__ u32 source(const Step<T>& step, u32 choice) {
    return OPERATION == ROWS ? choice : choice / step.top_k;
}

// Finishes and stores the element of a choice: `sums` are its products, with SwiGLU gate and up.
template <u32 OPERATION, class T, u32 PARTS>
__device__ __forceinline__ void store(const Step<T>& step, u32 choice, u32 column, const float (&sums)[PARTS]) {
    const u64 at = u64(choice) * step.outputs + column;
    float result = sums[0];
    if constexpr (OPERATION == ROWS) {
        if (step.addend) result += to_float(step.addend[at]);
        if (step.wide) {
            reinterpret_cast<float*>(step.out)[at] = result;
            return;
        }
    } else {
        // As if the products had been stored in between.
        float stored[PARTS];
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) stored[part] = to_float(from_float<T>(sums[part]));
        if constexpr (OPERATION == SWIGLU) {
            result = stored[0] * sigmoid(stored[0]) * stored[1];
        } else {
            result = activate(step.kind, stored[0]);
        }
    }
    step.out[at] = from_float<T>(result);
}

template <u32 OPERATION> constexpr u32 PARTS_OF = OPERATION == SWIGLU ? 2 : 1;

// bf16 on tensor cores (mma.m16n8k16): 16 rows of the matrix are the instruction's rows, 8 choices its columns.
//
// A sum over the depth may be taken in any order that both operands agree on. In 32 elements of the depth lane l has
// those from l % 4 * 8 on of its rows, 16 bytes: the first four are what the instruction wants of it in one step of 16,
// the last four in the next. So nothing is shuffled.

// Elements of the depth that a warp takes at once: whole lines of memory.
constexpr u32 SPAN = 64;
constexpr u32 HALF = SPAN / 2;
// Spans that are on their way to a warp with 16 M rows of the matrix, and blocks that share a multiprocessor: enough
// bytes in flight for the memory to be busy.
template <u32 M> constexpr u32 STAGES_OF = M == 1 ? 8 : M == 2 ? 4 : 3;
template <u32 M> constexpr u32 RESIDENT = M == 4 ? 2 : 3;

// Starts to copy 16 bytes of weights from global to shared memory, or zeros if they are not `there`.
__device__ __forceinline__ void copy_weights(uint4* to, const bf16* from, bool there) {
    const u32 address = u32(__cvta_generic_to_shared(to)), bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
                 : "memory");
}

// What this thread has started to copy since the last call becomes one group.
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the latest PENDING groups of this thread.
template <u32 PENDING> __device__ __forceinline__ void await_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Blocks of 16 M rows of the matrix, for at most 8 TILES choices. Warps take turns at spans of the depth, so an
// element's sums are the same whatever M and TILES.
template <u32 OPERATION, u32 TILES, u32 M> __device__ __forceinline__ void multiply(const Step<bf16>& step) {
    extern __shared__ __align__(16) uint4 shared[];
    __shared__ u32 list[MAX_ROWS];
    const bf16* matrix;
    const u32 rows = take_expert(step, list, matrix);
    if (rows == 0) return;

    constexpr u32 PARTS = PARTS_OF<OPERATION>;
    // Elements of the result, and eights of rows of the matrix for each part of them.
    constexpr u32 COLUMNS = 16 * M / PARTS, EIGHTS = COLUMNS / 8;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 lane_row = lane / 4, lane_depth = warp * SPAN + lane % 4 * 8;
    const u32 first = blockIdx.x * COLUMNS;
    const u32 depth = step.depth;

    // Each lane copies what it will multiply itself: it waits for no other, and banks do not conflict.
    constexpr u32 STAGES = STAGES_OF<M>, PIECES = 2 * 2 * M;
    const auto place = [&](u32 stage, u32 half, u32 i) {
        return shared + ((stage * WARPS + warp) * PIECES + half * 2 * M + i) * WARP + lane;
    };
    const auto copy = [&](u32 span, u32 stage) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 at = span * (WARPS * SPAN) + half * HALF + lane_depth;
#pragma unroll
            for (u32 i = 0; i < 2 * M; i++) {
                const u32 column = first + i % EIGHTS * 8 + lane_row;
                const bool there = column < step.outputs && at < depth;
                const u64 row = i / EIGHTS * step.outputs + column;
                const bf16* const from = there ? matrix + row * depth + at : matrix;
                copy_weights(place(stage, half, i), from, there);
            }
        }
    };
    const u32 all_spans = (depth + SPAN - 1) / SPAN;
    const u32 spans = (all_spans + WARPS - 1 - warp) / WARPS;
#pragma unroll
    for (u32 stage = 0; stage < STAGES; stage++) {
        if (stage < spans) copy(stage, stage);
        close_group();
    }

    u32 row_of[TILES];
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        const u32 row = tile * 8 + lane_row;
        row_of[tile] = row < rows ? source<OPERATION>(step, list[row]) * depth : NOBODY;
    }
    float sums[M][TILES][4];
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums[m][tile][i] = 0.0f;
        }
    }

#pragma unroll 1
    for (u32 span = 0, stage = 0; span < spans; span++) {
        uint4 x[2][TILES];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 at = span * (WARPS * SPAN) + half * HALF + lane_depth;
#pragma unroll
            for (u32 tile = 0; tile < TILES; tile++) {
                x[half][tile] = make_uint4(0, 0, 0, 0);
                if (row_of[tile] != NOBODY && at < depth) {
                    x[half][tile] = __ldg(reinterpret_cast<const uint4*>(step.x + row_of[tile] + at));
                }
            }
        }
        await_groups<STAGES - 1>();
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            uint4 w[2 * M];
#pragma unroll
            for (u32 i = 0; i < 2 * M; i++) w[i] = *place(stage, half, i);
#pragma unroll
            for (u32 tile = 0; tile < TILES; tile++) {
                if (tile * 8 < rows) {
                    const uint4& b = x[half][tile];
#pragma unroll
                    for (u32 m = 0; m < M; m++) {
                        const uint4 &low = w[2 * m], &high = w[2 * m + 1];
                        mma(sums[m][tile], low.x, high.x, low.y, high.y, b.x, b.y);
                        mma(sums[m][tile], low.z, high.z, low.w, high.w, b.z, b.w);
                    }
                }
            }
        }
        if (span + STAGES < spans) copy(span + STAGES, stage);
        close_group();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // The ring becomes the place where warps add up; rows lie so that neither access has conflicts.
    constexpr u32 STRIDE = 16 * M + 4;
    float* const parts = reinterpret_cast<float*>(shared);
    await_groups<0>();
    __syncthreads();
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
        if (tile * 8 < rows) {
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 row = tile * 8 + lane % 4 * 2 + i % 2, column = m * 16 + i / 2 * 8 + lane_row;
                    parts[(warp * TILES * 8 + row) * STRIDE + column] = sums[m][tile][i];
                }
            }
        }
    }
    __syncthreads();
    for (u32 element = threadIdx.x; element < rows * COLUMNS; element += BLOCK) {
        const u32 row = element / COLUMNS, column = element % COLUMNS;
        if (first + column >= step.outputs) continue;
        float totals[PARTS];
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            const float* const from = parts + row * STRIDE + part * COLUMNS + column;
            totals[part] = from[0];
#pragma unroll
            for (u32 warp = 1; warp < WARPS; warp++) totals[part] += from[warp * TILES * 8 * STRIDE];
        }
        store<OPERATION>(step, list[row], first + column, totals);
    }
}

// Every type and size, simply: a warp for each element of the result, eight choices at a time.
template <u32 OPERATION, class T, u32 N> __device__ __forceinline__ void multiply_packs(const Step<T>& step) {
    __shared__ u32 list[MAX_ROWS];
    const T* matrix;
    const u32 rows = take_expert(step, list, matrix);
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 column = blockIdx.x * WARPS + warp;
    if (column >= step.outputs) return;

    constexpr u32 PARTS = PARTS_OF<OPERATION>, TOGETHER = 8;
    for (u32 first = 0; first < rows; first += TOGETHER) {
        const T* x[TOGETHER];
        float sums[TOGETHER][PARTS];
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            const u32 row = source<OPERATION>(step, list[min(first + i, rows - 1)]);
            x[i] = step.x + u64(row) * step.depth;
#pragma unroll
            for (u32 part = 0; part < PARTS; part++) sums[i][part] = 0.0f;
        }
        for (u32 at = lane * N; at < step.depth; at += WARP * N) {
            Pack<T, N> w[PARTS];
#pragma unroll
            for (u32 part = 0; part < PARTS; part++) {
                w[part] = load_pack<N>(matrix + u64(part * step.outputs + column) * step.depth + at);
            }
#pragma unroll
            for (u32 i = 0; i < TOGETHER; i++) {
                if (first + i < rows) {
                    const auto pack = load_pack<N>(x[i] + at);
#pragma unroll
                    for (u32 part = 0; part < PARTS; part++) {
#pragma unroll
                        for (u32 n = 0; n < N; n++) sums[i][part] = fmaf(w[part].get(n), pack.get(n), sums[i][part]);
                    }
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < TOGETHER; i++) {
            if (first + i < rows) {
#pragma unroll
                for (u32 part = 0; part < PARTS; part++) sums[i][part] = warp_sum(sums[i][part]);
                if (lane == 0) store<OPERATION>(step, list[first + i], column, sums[i]);
            }
        }
    }
}

// NAME_bf16_CxR: for at most C choices of an expert, R rows of its matrix to a block.
#define DEFINE_TILES(NAME, OPERATION, CHOICES, MATRIX_ROWS)                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT<MATRIX_ROWS / 16>)                         \
    NAME##_bf16_##CHOICES##x##MATRIX_ROWS(Step<bf16> step) {                                                \
        multiply<OPERATION, CHOICES / 8, MATRIX_ROWS / 16>(step);                                           \
    }

#define DEFINE_PACKS(NAME, OPERATION, T, SUFFIX, N)                                                         \
    extern "C" __global__ void __launch_bounds__(BLOCK) NAME##_##SUFFIX##_##N(Step<T> step) {               \
        multiply_packs<OPERATION, T, N>(step);                                                              \
    }

#define DEFINE(NAME, OPERATION)               \
    DEFINE_TILES(NAME, OPERATION, 8, 16)      \
    DEFINE_TILES(NAME, OPERATION, 8, 32)      \
    DEFINE_TILES(NAME, OPERATION, 16, 16)     \
    DEFINE_TILES(NAME, OPERATION, 16, 32)     \
    DEFINE_TILES(NAME, OPERATION, 32, 16)     \
    DEFINE_TILES(NAME, OPERATION, 32, 32)     \
    DEFINE_TILES(NAME, OPERATION, 64, 32)     \
    DEFINE_TILES(NAME, OPERATION, 64, 64)     \
    DEFINE_PACKS(NAME, OPERATION, bf16, bf16, 1) \
    DEFINE_PACKS(NAME, OPERATION, float, f32, 1) \
    DEFINE_PACKS(NAME, OPERATION, float, f32, 4)

DEFINE(few_swiglu, SWIGLU)
DEFINE(few_activated, PLAIN)
DEFINE(few_rows, ROWS)
