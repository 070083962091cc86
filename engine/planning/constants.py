"""All constants of the planner, with the measurements that they were fitted to."""

# Candidate sides of tiles, largest first: powers of two, and the midpoints between them.
SIDES = sorted({2**n for n in range(5, 15)} | {3 * 2**n for n in range(4, 13)}, reverse=True)
# Larger tiles than these are not faster: the limit is a core's cache on the CPU, and the number of cores on a GPU.
# On the CPU, one-stage inference retains no graph and gains from larger tiles, because weights are read less often. Of
# stock PyTorch's time ResNet-18 takes 0.40 with 1024 and 0.53 with 512, ResNet-50 0.46 and 0.88 (2048 x 2048, two
# threads, CPU seconds).
PREFERRED, PREFERRED_IN_INFERENCE = {"cpu": 512, "cuda": 4096}, 1024
# Preferred strip for stages of a few layers on the CPU (square root of its pixels), and the minimum rows of a strip.
PREFERRED_STRIP, LEAST_ROWS = 384, 16
# Maps are narrow if the widest map has fewer values per image pixel than this (lesionnet has 2, ResNet-18 16). On the
# CPU, strips are then faster: lesionnet takes 0.8 of the time of squares in training and half of it in inference;
# ResNet-18 gains nothing. Larger strips are faster still, though fewer of their graphs fit the budget. LARGER_TILES
# lists factors of pixels; a factor is at most the factor by which maps are narrower. A step of lesionnet on 2048 x 1664
# pixels in 96 MiB takes 0.42 s with strips of 128 rows, 0.28 with 608, stock PyTorch's 0.31. Its forward without a
# budget takes 0.089, 0.071 and 0.103 s.
WIDE_VALUES, LARGER_TILES = 16, (4, 3, 2, 1.5)
# On the CPU oneDNN caches a compiled kernel per operation and shape (55 to 90 kB each on six networks), including those
# of earlier image sizes, and copies of the weights in its own memory order.
KERNEL_BYTES, MOST_WEIGHT_COPIES = 90_000, 78_000_000
# In 16 bits, including kernels that reorder maps (137 kB on a U-Net and a network of separable convolutions).
KERNEL_BYTES_16 = 140_000
# Pages of libraries that the first training or inference step loads (lesionnet, whose step is small).
CODE_BYTES = {True: 5_000_000, False: 3_000_000}
# Python objects per value of the recorded network, including TorchDynamo's graph and guards (31 to 44 kB on ResNet,
# MobileNetV3, EfficientNet, DenseNet and RegNetY with 250 to 1300 values), and additionally per choice of stored maps.
VALUE_BYTES, CHOICE_BYTES = 33_000, 800
# The channels of a block in oneDNN's layouts; channels are padded to a multiple of it.
CHANNEL_BLOCK = 16
# The C library's heap retains freed blocks that later ones do not fit into. Under a budget this is limited
# (`memory_limit.py`): to a share of a tile's activations, and a share of the bytes that retained tiles hold.
# The arena has as many free pages between its blocks.
HEAP_SHARE, HELD_SHARE = 0.1, 0.05
# The heap's share without a budget (fitted to ResNet-18 and -50, benchmarks/results/memory_cpu.json). A training step
# under a budget reserves it before it retains graphs of tiles: EfficientNet-B0 then takes 0.85 of the time, ResNet-18
# 0.85 to 1, others are as fast.
LOOSE_SHARE, LOOSE_SHARE_FEW_TILES, LOOSE_FEW_TILES = 2.5, 1.1, 8
# The heap's share for inference under a budget, if it is not limited further. A forward then takes at most half the
# time of a share of 0.5 (MobileNetV3, RegNetY, EfficientNet-B0, ResNet-18, lesionnet; 4 and 7 differ by noise). The
# predicted peak must not exceed LOOSE_UNDER of the budget.
LOOSE_SHARE_INFERENCE, LOOSE_UNDER = 4, 0.85
# On a GPU: the workspaces of cuBLAS (32 MiB per stream on Hopper, two streams) and cuDNN; and the maximum number of
# splits of the gradient of a large weight. Both are from documentation and code; no GPU was measured.
GPU_LIBRARIES, WGRAD_SPLITS = 96 * 2**20, 8
# Number of strategies that are made of a long series before the search knows between which two the best one is.
SAMPLE = 8
# Number of choices of stored maps that are tried in order, from the first that might fit, before the search bisects.
IN_ORDER = 3
# Number of sides, from the largest, that are tried before the next choice of stored maps.
COARSE = 3
# On a GPU, number of further sides that are tried after one that fits but runs op by op, to find one that is captured.
CAPTURED_SIDES = 4
# Number of sides whose tiles are simulated for the error message if nothing fits.
LEAST_SIDES = 3
# A tile is simulated if its peak, scaled from another tile, exceeds the limit by at most this factor.
NEARLY = 1.15
# Number of choices of stored maps, from the one that needs the least, that are tried with smaller tiles.
SMALL_TILES = 3
# Resident parts of offloaded maps: those of a tile and of the next tile, and the gradients of one of them.
# Maps in files are memory-mapped and not prefetched.
AWAY_TILES = 3
MAPPED_TILES = 2
# Number of stages whose tile is simulated in addition to that with the heaviest blocks: those with the highest peaks.
COUNTED = 2
# Graph buffers of a tile are allocated in chunks, and are larger at the end of the image than in the middle.
ARENA_SHARE = 2
# Share of the free memory that a step may use without a budget.
FREE_SHARE = 0.8
# Share of that memory that graphs of tiles may fill on the CPU.
FREE_ROOM_SHARE = 0.25
# Peak of stock PyTorch's step on the CPU from its tensors' peak: a share, and bytes of its libraries and its heap. Ten
# networks took at least 104 MiB more than their tensors at 512 to 1024 pixels, and ResNet-18 at 2048 took 165 MiB more.
STOCK_SHARE, STOCK_BYTES = 1.03, 80 * 2**20
# A budget of so many predicted peaks of stock, and a copy of the largest weight, is kept by a step on the whole image:
# 18 networks took 0.65 to 0.98 of the peak, and VGG-11, with a weight of 392 MiB, 264 MiB more than it.
ROOMY = 1.2
# Maps of a training step in NCHW up to which the whole image is computed at once on a CPU. With two threads, tiles
# take 1.04 times stock's time for ResNet-18 at 1024 pixels (500 MiB) and 1.12 for EfficientNet-B0 (1.3 GiB), but 2.3
# times for GhostNetV2; at 1536 pixels with one thread 0.75, 0.65 and 1.2 times.
WHOLE_BYTES = 768 * 2**20
# Floating-point operations per moved byte; the cost of pointwise ops is the bytes that they move.
FLOPS_PER_BYTE = {"cpu": 10, "cuda": 200}
# Storage for offloaded maps, and the floating-point operations per byte moved there.
ELSEWHERE = {"cpu": {"disk": 100}, "cuda": {"host": 10_000, "disk": 100_000}}
# Common GPUs: memory in GB, GB/s, and dense TFLOP/s in float32 and in 16 bits, from NVIDIA's data sheets. The predicted
# times of GPUs that are not installed follow from them; they are lower bounds.
GPUS = {
    "T4": (16, 320, 8.1, 65),
    "RTX 4090": (24, 1008, 82.6, 165.2),
    "L40S": (48, 864, 91.6, 362),
    "A100": (80, 2039, 19.5, 312),
    "H100": (80, 3350, 67, 989),
}
