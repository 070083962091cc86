"""Every constant of the plan, with what it was fitted to."""

# Sides that are tried, largest first: powers of two and their halves in between.
SIDES = sorted({2**n for n in range(5, 15)} | {3 * 2**n for n in range(4, 13)}, reverse=True)
# Larger tiles than these gain no speed: a core's cache on the CPU, the width of the machine on a GPU. A prediction of
# one stage on the CPU keeps no graph, and gains by larger ones, in which weights are read less often: of stock's time
# ResNet-18 takes 0.40 with 1024 and 0.53 with 512, ResNet-50 0.46 and 0.88 (2048 x 2048, two threads, CPU seconds).
PREFERRED, PREFERRED_IN_INFERENCE = {"cpu": 512, "cuda": 4096}, 1024
# The same for stages of a few layers on the CPU, as the square root of a strip's pixels; and a strip's rows at least.
PREFERRED_STRIP, LEAST_ROWS = 384, 16
# Values of the widest map for a pixel of the image below which maps are narrow (lesionnet has 2, ResNet-18 16). On the
# CPU strips gain speed then (lesionnet takes 0.8 of the time of squares in training, half of it in inference; ResNet-18
# gains nothing), and larger ones more, though fewer of their graphs fit the budget: how many times as many pixels they
# may have, at most as many times as maps are narrower (a step of lesionnet on 2048 x 1664 pixels in 96 MiB takes 0.42 s
# with strips of 128 rows, 0.28 of 608, stock's 0.31; its forward without a budget 0.089, 0.071 and 0.103 s).
WIDE_VALUES, LARGER_TILES = 16, (4, 3, 2, 1.5)
# On the CPU oneDNN keeps a compiled kernel per operation and shape (55 to 90 kB each on six networks), those of former
# image sizes among them, and copies of the weights in its own memory order.
KERNEL_BYTES, MOST_WEIGHT_COPIES = 90_000, 78_000_000
# In 16 bits, with those that bring maps into its order (137 kB on a U-Net and a network of separable convolutions).
KERNEL_BYTES_16 = 140_000
# Pages of libraries that a process first reads in a training step, and in inference (lesionnet, whose step is small).
CODE_BYTES = {True: 5_000_000, False: 3_000_000}
# Objects for a value of the recorded network, TorchDynamo's graph and guards among them (31 to 44 kB on ResNet,
# MobileNetV3, EfficientNet, DenseNet and RegNetY with 250 to 1300 values), and for each choice of stored maps.
VALUE_BYTES, CHOICE_BYTES = 33_000, 800
# The channels of a block in oneDNN's layouts; what is not a multiple is padded.
CHANNEL_BLOCK = 16
# The C library's heap keeps freed blocks that later ones do not fit into. How much of that it may keep under a budget
# is ours to say (`memory_limit.py`), as a share of a tile's activations: at least; and of what retained tiles hold.
# The arena has as many free pages between its blocks.
HEAP_SHARE, HELD_SHARE = 0.1, 0.05
# Without a budget the heap takes so much (fitted to ResNet-18 and -50, benchmarks/results/memory_cpu.json). A training
# step under a budget lets it have that before graphs of tiles are retained: EfficientNet-B0 takes 0.85 of the time
# then, ResNet-18 0.85 to 1, others are as fast.
LOOSE_SHARE, LOOSE_SHARE_FEW_TILES, LOOSE_FEW_TILES = 2.5, 1.1, 8
# In inference under a budget: what the heap keeps where it is not held to less, with which a forward takes half the
# time or less than with 0.5 (MobileNetV3, RegNetY, EfficientNet-B0, ResNet-18, lesionnet; 4 and 7 differ by noise); but
# not more than makes this share of the budget.
LOOSE_SHARE_INFERENCE, LOOSE_UNDER = 4, 0.85
# On a GPU: cuBLAS's workspaces (32 MiB a stream on Hopper, two streams) and cuDNN's own; and in how many splits the
# gradient of a large weight is summed at most. Both from documentation and code; no GPU was measured.
GPU_LIBRARIES, WGRAD_SPLITS = 96 * 2**20, 8
# How many sides, from the largest on, are tried before another choice of stored maps is.
COARSE = 3
# Sides that a GPU is tried with after one that fits and runs op by op, for one whose tiles are captured.
CAPTURED_SIDES = 4
# Sides that are counted themselves where nothing fits, to say what is least.
LEAST_SIDES = 3
# A tile that takes up to so much too much by another one's figures is counted itself.
NEARLY = 1.15
# How many choices of stored maps, from the one that needs least on, are tried with smaller tiles.
SMALL_TILES = 3
# Of maps elsewhere, the parts that are here at a time: a tile's own, the next one's, and gradients of one of them.
# Those in files are read where they lie, and none ahead.
AWAY_TILES = 3
MAPPED_TILES = 2
# Stages whose tile is counted besides that of the heaviest blocks: those that have most there, whole maps included.
COUNTED = 2
# Graph buffers of a tile lie in chunks, and those at the end of the image are larger than in the middle.
ARENA_SHARE = 2
# Share of the free memory that is taken where no budget is given.
FREE_SHARE = 0.8
# And of that share, on the CPU, what graphs of tiles may fill.
FREE_ROOM_SHARE = 0.25
# Arithmetic that could be done while a byte is moved; pointwise ops cost what they move.
FLOPS_PER_BYTE = {"cpu": 10, "cuda": 200}
# Where maps may be kept besides on the device, and the arithmetic that could be done while a byte goes there.
ELSEWHERE = {"cpu": {"disk": 100}, "cuda": {"host": 10_000, "disk": 100_000}}
# Of GPUs that people have: memory in GB, GB/s, and TFLOP/s of float32 and of 16-bit products without sparsity, as their
# maker's data sheets say. They make the times of GPUs that are not here, which are lower bounds.
GPUS = {
    "T4": (16, 320, 8.1, 65),
    "RTX 4090": (24, 1008, 82.6, 165.2),
    "L40S": (48, 864, 91.6, 362),
    "A100": (80, 2039, 19.5, 312),
    "H100": (80, 3350, 67, 989),
}
