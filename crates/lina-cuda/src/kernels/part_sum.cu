// The sum of several parts of equal length that lie one after another, in their order: floating-point sums depend on it.

extern "C" __global__ void part_sum(const float* parts, u32 count, u64 len, float* sum) {
    const u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= len) return;
    float total = parts[at];
    for (u32 part = 1; part < count; part++) total += parts[part * len + at];
    sum[at] = total;
}
