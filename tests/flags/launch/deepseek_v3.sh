#!/bin/bash
#SBATCH --job-name=deepseek-v3
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive

# DeepSeek-V3 with 16 pipeline ranks of two virtual stages, experts over 64 ranks, DeepEP.
DENSE=3
MOE=58
ROUTED=256
GROUPS=8
LAYOUT='Et*3|(tt|)*29|mL'
FP8=${FP8:-true}

OPTIONS=" \
    --use-mcore-models \
    --num-layers $((DENSE + MOE)) \
    --hidden-size 7168 \
    --ffn-hidden-size 18432 \
    --num-attention-heads 128 \
    --kv-channels 128 \
    --multi-latent-attention \
    --q-lora-rank 1536 \
    --kv-lora-rank 512 \
    --qk-head-dim 128 \
    --qk-pos-emb-head-dim 64 \
    --v-head-dim 128 \
    --qk-layernorm \
    --normalization RMSNorm \
    --swiglu \
    --disable-bias-linear \
    --untie-embeddings-and-output-weights \
    --position-embedding-type rope \
    --no-position-embedding \
    --rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 1.0 \
    --vocab-size 129280 --make-vocab-size-divisible-by 1280 \
    --seq-length 4096 --max-position-embeddings 4096"

MOE_OPTIONS=" \
    --num-experts ${ROUTED} \
    --moe-layer-freq \"([0]*${DENSE}+[1]*${MOE})\" \
    --moe-ffn-hidden-size 2048 \
    --moe-shared-expert-intermediate-size 2048 \
    --moe-router-topk 8 \
    --moe-router-num-groups ${GROUPS} --moe-router-group-topk 4 \
    --moe-router-score-function sigmoid \
    --moe-router-pre-softmax \
    --moe-router-topk-scaling-factor 2.5 \
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3 \
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4 \
    --moe-router-dtype fp32 \
    --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep \
    --moe-deepep-num-sms 20 \
    --moe-grouped-gemm --moe-permute-fusion \
    --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1"

TRAIN_OPTIONS=" \
    --micro-batch-size 1 --global-batch-size 8192 \
    --train-samples 585937500 \
    --lr 3.9e-6 --min-lr 3.9e-7 --lr-decay-style cosine --clip-grad 1.0 \
    --bf16 \
    --use-precision-aware-optimizer --main-grads-dtype fp32 --main-params-dtype fp32 \
    --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 \
    --recompute-granularity selective --recompute-modules mla_up_proj layernorm moe_act mlp"

if [ "$FP8" = true ]; then
    TRAIN_OPTIONS="${TRAIN_OPTIONS} --fp8-recipe blockwise --fp8-format e4m3"
fi

PARALLEL_OPTIONS="--tensor-model-parallel-size 1 --pipeline-model-parallel-size 16 \
    --expert-model-parallel-size 64 --expert-tensor-parallel-size 1 --context-parallel-size 1 \
    --pipeline-model-parallel-layout \"${LAYOUT}\" \
    --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"

DATA_OPTIONS="--data-path ${DATA_PATH} --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model deepseek-ai/DeepSeek-V3 --split 99,1,0 --num-workers 6"

RUN="python -u ${MEGATRON_PATH}/pretrain_gpt.py ${OPTIONS} ${MOE_OPTIONS} ${TRAIN_OPTIONS} ${PARALLEL_OPTIONS} ${DATA_OPTIONS}"

srun -l --container-image ${IMAGE} sh -c "${RUN}"
