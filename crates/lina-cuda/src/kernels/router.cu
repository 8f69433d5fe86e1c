// The gate of a Mixture-of-Experts layer: a warp per token, whose lane l has experts l, l + 32, l + 64 and so on.

constexpr u32 OWN = 32;  // most experts of a lane
constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ u32 token_index() { return (blockIdx.x * blockDim.x + threadIdx.x) / WARP; }

// Calls `use(i, expert)` for each expert of this lane.
template <class Use> __device__ __forceinline__ void each_expert(u32 experts, Use use) {
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
        if (i * WARP >= experts) break;
        const u32 expert = i * WARP + threadIdx.x % WARP;
        if (expert < experts) use(i, expert);
    }
}

extern "C" __global__ void router_forward(
    const float* logits, u32 tokens, u32 experts, u32 top_k, u32 renormalise, float* probabilities,
    u32* expert_index, float* gate_weight
) {
    const u32 token = token_index();
    if (token >= tokens) return;
    const u32 lane = threadIdx.x % WARP;
    float values[OWN];
    float largest = minus_infinity();
    each_expert(experts, [&](u32 i, u32 expert) {
        values[i] = logits[u64(token) * experts + expert];
        largest = fmaxf(largest, values[i]);
    });
    largest = warp_max(largest);
    float total = 0.0f;
    each_expert(experts, [&](u32 i, u32) {
        values[i] = expf(values[i] - largest);
        total += values[i];
    });
    total = warp_sum(total);
    const float inverse = 1.0f / total;
    // Probabilities are not negative, so their bits, plus one, are in their order; 0 is for experts that are not there
    // or have been chosen.
    u32 keys[OWN];
    each_expert(experts, [&](u32 i, u32 expert) {
        values[i] *= inverse;
        keys[i] = __float_as_uint(values[i]) + 1;
        probabilities[u64(token) * experts + expert] = values[i];
    });
    const bool missing = isnan(total);  // then all probabilities are NaN

    float weights[2] = {0.0f, 0.0f};  // of slots `lane` and `lane + 32`
    u32 choices[2] = {0, 0};
    for (u32 slot = 0; slot < top_k; slot++) {
        u32 key = 0, choice = ALL;
        each_expert(experts, [&](u32 i, u32 expert) {
            if (keys[i] > key) {
                key = keys[i];
                choice = expert;
            }
        });
        const u32 best = __reduce_max_sync(ALL, key);
        choice = __reduce_min_sync(ALL, key == best ? choice : ALL);
        each_expert(experts, [&](u32 i, u32 expert) {
            if (expert == choice) keys[i] = 0;
        });
        if (slot % WARP == lane) {
            weights[slot / WARP] = missing ? total : __uint_as_float(best - 1);
            choices[slot / WARP] = missing ? slot : choice;
        }
    }
    if (renormalise) {
        const float factor = 1.0f / warp_sum(weights[0] + weights[1]);
        weights[0] *= factor;
        weights[1] *= factor;
    }
    for (u32 i = 0; i < 2; i++) {
        const u32 slot = i * WARP + lane;
        if (slot >= top_k) break;
        expert_index[u64(token) * top_k + slot] = choices[i];
        gate_weight[u64(token) * top_k + slot] = weights[i];
    }
}

// The logarithm of the sum of the exponentials of a token's logits.
__device__ __forceinline__ float log_sum_exp(const float* logits, u32 experts) {
    float largest = minus_infinity();
    each_expert(experts, [&](u32, u32 expert) { largest = fmaxf(largest, logits[expert]); });
    largest = warp_max(largest);
    float total = 0.0f;
    each_expert(experts, [&](u32, u32 expert) { total += expf(logits[expert] - largest); });
    return largest + logf(warp_sum(total));
}

extern "C" __global__ void router_backward(
    const float* probabilities, const u32* expert_index, const float* gate_weight, u32 tokens, u32 experts,
    u32 top_k, u32 renormalise, const float* grad_gate_weight, const float* balance, float z_loss_scale,
    const float* logits, float* grad_logits
) {
    const u32 token = token_index();
    if (token >= tokens) return;
    const u32 lane = threadIdx.x % WARP;
    probabilities += u64(token) * experts;
    expert_index += u64(token) * top_k;
    gate_weight += u64(token) * top_k;
    grad_gate_weight += u64(token) * top_k;
    logits += u64(token) * experts;
    grad_logits += u64(token) * experts;

    float own[OWN], grad[OWN];
    each_expert(experts, [&](u32 i, u32 expert) {
        own[i] = probabilities[expert];
        grad[i] = balance ? balance[expert] : 0.0f;
    });
    float inverse = 1.0f, mean = 0.0f;
    if (renormalise) {
        float total = 0.0f;
        for (u32 slot = lane; slot < top_k; slot += WARP) {
            total += probabilities[expert_index[slot]];
            mean += gate_weight[slot] * grad_gate_weight[slot];
        }
        inverse = 1.0f / warp_sum(total);
        mean = warp_sum(mean);
    }
    for (u32 slot = 0; slot < top_k; slot++) {
        const u32 choice = expert_index[slot];
        const float change = (grad_gate_weight[slot] - mean) * inverse;
        each_expert(experts, [&](u32 i, u32 expert) {
            if (expert == choice) grad[i] += change;
        });
    }
    float along = 0.0f;
    each_expert(experts, [&](u32 i, u32) { along += own[i] * grad[i]; });
    float shift = -warp_sum(along);
    if (z_loss_scale != 0.0f) shift += 2.0f * z_loss_scale * log_sum_exp(logits, experts);
    each_expert(experts, [&](u32 i, u32 expert) { grad_logits[expert] = own[i] * (grad[i] + shift); });
}

extern "C" __global__ void z_loss(const float* logits, u32 tokens, u32 experts, float* out) {
    const u32 token = token_index();
    if (token >= tokens) return;
    const float total = log_sum_exp(logits + u64(token) * experts, experts);
    if (threadIdx.x % WARP == 0) out[token] = total * total;
}
