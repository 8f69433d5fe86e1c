// Products of the rows of many experts in one launch, with Hopper's tensor cores and copy engine.
//
// A block computes tiles of 128 rows and N columns of C, one after another. Its last warp is the producer: one thread
// fills a ring of stages, each 64 of the depth of A and of B, through tensor maps. Two consumer warpgroups multiply, 64
// rows each, and store, while the producer is stages ahead with the next tile.
//
// Shared memory holds boxes of rows of 128 bytes, whose 16-byte parts are swizzled by the row's number modulo 8. An
// operand is K-major where a row is 64 of the depth, of one row or column of C, and MN-major where a row is 64 rows or
// columns of C, at one depth. Weight gradients have both operands MN-major: the depth is the rows of a group.
//
// An element of C is one chain of sums over the depth in steps of 16, whatever the tile, the group's size and the place
// of its row in it.

// For GPUs without these instructions the module is empty.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr u32 TILE_ROWS = 128;
// Rows of a warpgroup.
constexpr u32 SLAB_ROWS = 64;
constexpr u32 DEPTH = 64;
constexpr u32 BOX_BYTES = 64 * 128;
// 128 bytes of f32.
constexpr u32 GRADIENT_BOX_COLUMNS = 32;
constexpr u32 A_BYTES = TILE_ROWS * DEPTH * 2;
constexpr u32 WARPGROUP = 128;
constexpr u32 CONSUMERS = 2;
// Boxes of a consumer: one is filled while the other is stored.
constexpr u32 BOXES = 2;
constexpr u32 THREADS = CONSUMERS * WARPGROUP + WARP;
// Rows of tiles that are finished before the next ones begin, so that the tiles at work at a time share operands in L2.
constexpr u32 BAND = 16;
// Together with the tensor maps, what fits into 4 KiB of arguments.
constexpr u32 MAX_GROUPS = 224;

// As the driver encodes it.
struct alignas(128) TensorMap {
    unsigned char bytes[128];
};

// Rows of A from `a_row` on, times matrix `slot` of B, are rows of C from `c_row` on. For weight gradients rows of A
// and B from `a_row` on, and matrix `slot` of C.
struct Group {
    u32 slot, a_row, c_row, rows;
};

struct Groups {
    u32 count;
    Group list[MAX_GROUPS];
};

struct Sizes {
    // Rows of a gradient.
    u32 m;
    u32 n;
    // Depth, except of a gradient.
    u32 k;
};

// Shared memory: barriers, a ring of stages, and boxes of each consumer, which its results go through.
template <u32 N> struct Memory {
    static constexpr u32 STAGE_BYTES = A_BYTES + N * DEPTH * 2;
    static constexpr u32 STAGES = 192 * 1024 / STAGE_BYTES;
    static constexpr u32 RING = 1024;
    static constexpr u32 RESULTS = RING + STAGES * STAGE_BYTES;
};

__device__ __forceinline__ u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// ---- Barriers

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for all threads of a consumer.
__device__ __forceinline__ void sync_consumer(u32 consumer) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + consumer), "n"(WARPGROUP) : "memory");
}

// Makes ordinary writes to shared memory visible to tensor cores and the copy engine.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Copy engine

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void load_box(const TensorMap& map, u32 to, u32 barrier, u32 x, u32 y, u32 z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap& map, u32 from, u32 x, u32 y, u32 z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
        "r"(from), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void add_box(const TensorMap& map, u32 from, u32 x, u32 y, u32 z) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
        "r"(from), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until shared memory has been read by all but the last `PENDING` groups of stores.
template <u32 PENDING> __device__ __forceinline__ void wait_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// ---- Tensor cores

// Descriptor of a box-wise, swizzled operand, without its address: 8 rows of 128 bytes are 1024 bytes apart, and where
// rows run along M or N, boxes are BOX_BYTES apart. In units of 16 bytes.
template <bool K_MAJOR> __device__ __forceinline__ u64 descriptor(u32 address) {
    constexpr u64 LEADING = K_MAJOR ? 1 : BOX_BYTES / 16;
    constexpr u64 STRIDE = 1024 / 16;
    constexpr u64 SWIZZLE_128_BYTES = 1;
    return SWIZZLE_128_BYTES << 62 | STRIDE << 32 | LEADING << 16 | (address & 0x3ffff) >> 4;
}

// How far a descriptor's address moves for the next 16 of the depth: within the rows, or by 16 of them.
template <bool K_MAJOR> constexpr u64 DESCRIPTOR_STEP = K_MAJOR ? 16 * 2 / 16 : 16 * 128 / 16;

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Operands of an instruction, whose text numbers them: the first 60 or 120 sums, and variables for 8 or 32.
#define NAMES_5(tens, a, b, c, d, e) "%" #tens #a ", %" #tens #b ", %" #tens #c ", %" #tens #d ", %" #tens #e ", "
#define NAMES_10(tens) NAMES_5(tens, 0, 1, 2, 3, 4) NAMES_5(tens, 5, 6, 7, 8, 9)
#define NAMES_60 NAMES_10() NAMES_10(1) NAMES_10(2) NAMES_10(3) NAMES_10(4) NAMES_10(5)
#define NAMES_120 NAMES_60 NAMES_10(6) NAMES_10(7) NAMES_10(8) NAMES_10(9) NAMES_10(10) NAMES_10(11)
#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)

// 64 x 256 sums of a warpgroup, plus (or, without `add`, as) the product of 64 x 16 of A and 16 x 256 of B.
template <bool A_K_MAJOR, bool B_K_MAJOR>
__device__ __forceinline__ void multiply(float (&sums)[128], u64 a, u64 b, u32 add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NAMES_120
        "%120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, %131, %132;\n"
        "}\n"
        : SUMS_32(0), SUMS_32(32), SUMS_32(64), SUMS_32(96)
        : "l"(a), "l"(b), "r"(add), "n"(A_K_MAJOR ? 0 : 1), "n"(B_K_MAJOR ? 0 : 1));
}

// 64 x 128 sums.
template <bool A_K_MAJOR, bool B_K_MAJOR>
__device__ __forceinline__ void multiply(float (&sums)[64], u64 a, u64 b, u32 add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_60
        "%60, %61, %62, %63}, %64, %65, p, 1, 1, %67, %68;\n"
        "}\n"
        : SUMS_32(0), SUMS_32(32)
        : "l"(a), "l"(b), "r"(add), "n"(A_K_MAJOR ? 0 : 1), "n"(B_K_MAJOR ? 0 : 1));
}

// Keeps the compiler from reading sums before the tensor cores have finished them.
template <u32 COUNT> __device__ __forceinline__ void sums_finished(float (&sums)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// ---- Tiles

struct Tile {
    // First row, counted from the group's first, and first column.
    u32 row, column;
};

// Walks over the tiles of all groups, which producer and consumers do alike.
template <u32 N, bool GRADIENT> struct Schedule {
    const Groups& groups;
    const Sizes& sizes;
    u32 group = 0;
    // Tiles of the groups before.
    u32 before = 0;

    __device__ __forceinline__ u32 rows() const { return GRADIENT ? sizes.m : groups.list[group].rows; }

    // Moves on to the group that has tile `number`, if there is one.
    __device__ __forceinline__ bool seek(u32 number) {
        for (; group < groups.count; group++) {
            const u32 tiles = ceil_div(rows(), TILE_ROWS) * ceil_div(sizes.n, N);
            if (number - before < tiles) return true;
            before += tiles;
        }
        return false;
    }

    __device__ __forceinline__ Tile tile(u32 number) const {
        const u32 columns = ceil_div(sizes.n, N);
        const u32 band = (number - before) / (BAND * columns);
        const u32 in_band = (number - before) % (BAND * columns);
        const u32 height = min(BAND, ceil_div(rows(), TILE_ROWS) - band * BAND);
        return {(band * BAND + in_band % height) * TILE_ROWS, in_band / height * N};
    }

    // Stages that the tile's depth takes.
    __device__ __forceinline__ u32 steps() const {
        return ceil_div(GRADIENT ? groups.list[group].rows : sizes.k, DEPTH);
    }
};

// Position in the ring of stages.
template <u32 STAGES> struct Cursor {
    u32 stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ---- Producer: one thread

template <u32 N, bool GRADIENT, bool B_K_MAJOR>
__device__ __forceinline__ void produce(const TensorMap& a, const TensorMap& b, Schedule<N, GRADIENT> schedule,
                                        u32 ring, u32 full, u32 empty) {
    constexpr u32 STAGE_BYTES = Memory<N>::STAGE_BYTES;
    Cursor<Memory<N>::STAGES> cursor;
    for (u32 number = blockIdx.x; schedule.seek(number); number += gridDim.x) {
        const Tile tile = schedule.tile(number);
        const Group& group = schedule.groups.list[schedule.group];
        const u32 slot = GRADIENT ? 0 : group.slot;
        const u32 steps = schedule.steps();
        for (u32 step = 0; step < steps; step++, cursor.advance()) {
            const u32 ready = full + 8 * cursor.stage;
            const u32 to_a = ring + cursor.stage * STAGE_BYTES;
            const u32 to_b = to_a + A_BYTES;
            const u32 depth = step * DEPTH;
            barrier_wait(empty + 8 * cursor.stage, cursor.parity ^ 1);
            barrier_expect(ready, STAGE_BYTES);
            if constexpr (GRADIENT) {
#pragma unroll
                for (u32 i = 0; i < TILE_ROWS / 64; i++) {
                    load_box(a, to_a + i * BOX_BYTES, ready, tile.row + 64 * i, group.a_row + depth, 0);
                }
            } else {
                load_box(a, to_a, ready, depth, group.a_row + tile.row, 0);
            }
            if constexpr (B_K_MAJOR) {
                load_box(b, to_b, ready, depth, tile.column, slot);
            } else {
                const u32 row = (GRADIENT ? group.a_row : 0) + depth;
#pragma unroll
                for (u32 i = 0; i < N / 64; i++) {
                    load_box(b, to_b + i * BOX_BYTES, ready, tile.column + 64 * i, row, slot);
                }
            }
        }
    }
}

// ---- Consumers: a warpgroup each

// Writes 32 columns of a warpgroup's sums, from the 16 that each thread has of them, to a box.
__device__ __forceinline__ void stage_f32(const float* sums, u32 box, u32 thread) {
    const u32 row = thread / WARP * 16 + thread % WARP / 4, pair = thread % 4;
    // Threads of odd rows write the other half of the columns first: otherwise two rows meet in every bank.
    const bool odd = row % 2;
#pragma unroll
    for (u32 first = 0; first < 2; first++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 low = first * 4 + half * 2, high = low + 8;
#pragma unroll
            for (u32 turn = 0; turn < 2; turn++) {
                const bool upper = odd != (turn == 1);
                const u32 block = first + (upper ? 2 : 0);
                const u32 to = box + (row + half * 8) * 128 + ((block * 2 + pair / 2) ^ (row % 8)) * 16 + pair % 2 * 8;
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(upper ? sums[high] : sums[low]),
                             "f"(upper ? sums[high + 1] : sums[low + 1])
                             : "memory");
            }
        }
    }
}

// Writes 64 columns of a warpgroup's sums, from the 32 that each thread has of them, to a box as bf16.
__device__ __forceinline__ void stage_bf16(const float* sums, u32 box, u32 thread) {
    const u32 lane = thread % WARP;
    const u32 row = thread / WARP * 16 + lane % 16;
#pragma unroll
    for (u32 pair = 0; pair < 4; pair++) {
        const float* from = sums + 8 * pair;
        const u32 to = box + row * 128 + ((2 * pair + lane / 16) ^ (row % 8)) * 16;
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
            "r"(pack_bf16(from[0], from[1])), "r"(pack_bf16(from[2], from[3])), "r"(pack_bf16(from[4], from[5])),
            "r"(pack_bf16(from[6], from[7]))
            : "memory");
    }
}

// Copies the first `rows` rows of a box to rows of `n` columns, of which `columns` are left.
__device__ __forceinline__ void copy_rows(u32 box, bf16* to, u32 n, u32 rows, u32 columns, u32 thread) {
    for (u32 i = thread; i < rows * 8; i += WARPGROUP) {
        const u32 row = i / 8, part = i % 8;
        if (part * 8 >= columns) continue;
        uint4 values;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
                     : "r"(box + row * 128 + (part ^ row % 8) * 16)
                     : "memory");
        *reinterpret_cast<uint4*>(to + u64(row) * n + part * 8) = values;
    }
}

// Zeros what a box has from row `first` on.
__device__ __forceinline__ void clear_rows(u32 box, u32 first, u32 thread) {
    for (u32 at = first * 128 + thread * 16; at < BOX_BYTES; at += WARPGROUP * 16) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(box + at), "r"(0) : "memory");
    }
}

template <u32 N, bool GRADIENT, bool B_K_MAJOR>
__device__ __forceinline__ void consume(const TensorMap& c, bf16* c_rows, Schedule<N, GRADIENT> schedule,
                                        bool accumulate, u32 ring, u32 full, u32 empty, u32 boxes, u32 consumer) {
    constexpr u32 BOX_COLUMNS = GRADIENT ? GRADIENT_BOX_COLUMNS : 64;
    constexpr bool A_K_MAJOR = !GRADIENT;
    const u32 thread = threadIdx.x % WARPGROUP;
    const u32 n = schedule.sizes.n;
    const auto release = [&](u32 stage) {
        // A warp's products have read the stage once it has waited for them itself: each arrives.
        if (thread % WARP == 0) barrier_arrive(empty + 8 * stage);
    };
    Cursor<Memory<N>::STAGES> cursor;
    u32 boxes_used = 0;
    float sums[N / 2];
    for (u32 number = blockIdx.x; schedule.seek(number); number += gridDim.x) {
        const Tile tile = schedule.tile(number);
        const Group& group = schedule.groups.list[schedule.group];
        const u32 steps = schedule.steps();
        u32 last = 0;
        for (u32 step = 0; step < steps; step++) {
            const u32 stage = ring + cursor.stage * Memory<N>::STAGE_BYTES;
            barrier_wait(full + 8 * cursor.stage, cursor.parity);
            if constexpr (GRADIENT) {
                const u32 left = group.rows - step * DEPTH;
                if (left < DEPTH) {
                    // Rows beyond the group's last. Each consumer clears all that it reads itself, so that none waits.
                    clear_rows(stage + consumer * BOX_BYTES, left, thread);
                    for (u32 i = 0; i < N / 64; i++) clear_rows(stage + A_BYTES + i * BOX_BYTES, left, thread);
                    fence_async();
                    sync_consumer(consumer);
                }
            }
            const u64 a = descriptor<A_K_MAJOR>(stage + consumer * BOX_BYTES);
            const u64 b = descriptor<B_K_MAJOR>(stage + A_BYTES);
            wgmma_fence();
#pragma unroll
            for (u32 i = 0; i < DEPTH / 16; i++) {
                multiply<A_K_MAJOR, B_K_MAJOR>(sums, a + i * DESCRIPTOR_STEP<A_K_MAJOR>,
                                               b + i * DESCRIPTOR_STEP<B_K_MAJOR>, step + i);
            }
            wgmma_commit();
            // The products of the stage before are done, those of this one go on.
            wgmma_wait<1>();
            if (step > 0) release(last);
            last = cursor.stage;
            cursor.advance();
        }
        wgmma_wait<0>();
        sums_finished(sums);
        release(last);

        const u32 slab = tile.row + consumer * SLAB_ROWS;
        if (slab >= schedule.rows()) continue;
        const u32 rows = schedule.rows() - slab;
#pragma unroll
        for (u32 first = 0; first < N; first += BOX_COLUMNS) {
            const u32 column = tile.column + first;
            if (column >= n) break;
            const u32 box = boxes + boxes_used++ % BOXES * BOX_BYTES;
            if (thread == 0) wait_stores<BOXES - 1>();
            sync_consumer(consumer);
            if constexpr (GRADIENT) {
                stage_f32(sums + first / 2, box, thread);
            } else {
                stage_bf16(sums + first / 2, box, thread);
            }
            fence_async();
            sync_consumer(consumer);
            if constexpr (GRADIENT) {
                if (thread == 0) {
                    if (accumulate) {
                        add_box(c, box, column, slab, group.slot);
                    } else {
                        store_box(c, box, column, slab, group.slot);
                    }
                }
            } else if (rows >= SLAB_ROWS) {
                if (thread == 0) store_box(c, box, column, group.c_row + slab, 0);
            } else {
                // The rows below are another group's.
                copy_rows(box, c_rows + u64(group.c_row + slab) * n + column, n, rows, n - column, thread);
            }
            // A group for every box, also an empty one: that counts the boxes.
            if (thread == 0) commit_stores();
        }
    }
    if (thread == 0) wait_stores<0>();
}

template <u32 N, bool GRADIENT, bool B_K_MAJOR>
__device__ __forceinline__ void grouped(const TensorMap& a, const TensorMap& b, const TensorMap& c,
                                        const Groups& groups, const Sizes& sizes, bf16* c_rows, bool accumulate) {
    using Layout = Memory<N>;
    // The swizzle goes by addresses.
    alignas(1024) extern __shared__ unsigned char shared[];
    const u32 memory = shared_address(shared);
    const u32 full = memory, empty = full + 8 * Layout::STAGES, ring = memory + Layout::RING;
    const Schedule<N, GRADIENT> schedule{groups, sizes};
    if (threadIdx.x == 0) {
        prefetch_map(a);
        prefetch_map(b);
        prefetch_map(c);
        for (u32 stage = 0; stage < Layout::STAGES; stage++) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, CONSUMERS * WARPGROUP / WARP);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < CONSUMERS * WARPGROUP) {
        const u32 consumer = threadIdx.x / WARPGROUP;
        const u32 boxes = memory + Layout::RESULTS + consumer * BOXES * BOX_BYTES;
        consume<N, GRADIENT, B_K_MAJOR>(c, c_rows, schedule, accumulate, ring, full, empty, boxes, consumer);
    } else if (threadIdx.x == CONSUMERS * WARPGROUP) {
        produce<N, GRADIENT, B_K_MAJOR>(a, b, schedule, ring, full, empty);
    }
}

#define GROUPED(NAME, GRADIENT, B_K_MAJOR, N)                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                             \
        grouped_##NAME##_##N(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,   \
                             const __grid_constant__ TensorMap c, const __grid_constant__ Groups groups, \
                             const __grid_constant__ Sizes sizes, bf16* c_rows, u32 accumulate) {        \
        grouped<N, GRADIENT, B_K_MAJOR>(a, b, c, groups, sizes, c_rows, accumulate);                     \
    }

GROUPED(nk, false, true, 256)
GROUPED(nk, false, true, 128)
GROUPED(kn, false, false, 256)
GROUPED(kn, false, false, 128)
GROUPED(gradient, true, false, 256)
GROUPED(gradient, true, false, 128)

#endif
