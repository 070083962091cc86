"""Names of elementwise functions, grouped by source.

`TAGGED` is PyTorch's own list: the operators that torch 2.13 tags `torch.Tag.pointwise`, without those of `NOT_TAKEN`.
It is written out because the tags differ between versions and to show here what is exact; a test compares it with the
tags. A name covers the function, the method, the in-place form and `torch.special`.
"""

TAGGED = """
    abs acos acosh add addcdiv addcmul airy_ai angle asin asinh atan atan2 atanh
    bessel_j0 bessel_j1 bessel_y0 bessel_y1
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    ceil celu chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w
    clamp clamp_max clamp_min clip clone conj_physical copysign cos cosh
    deg2rad digamma div elu entr eq erf erfc erfcx erfinv exp exp2 expm1
    float_power floor fmax fmin fmod frac frexp gcd ge gelu gt
    hardshrink hardsigmoid hardtanh heaviside hermite_polynomial_h hermite_polynomial_he hypot
    i0 i0e i1 i1e igamma igammac isfinite isinf isnan isneginf isposinf laguerre_polynomial_l lcm ldexp le leaky_relu
    legendre_polynomial_p lerp lgamma log log10 log1p log2 log_ndtr logaddexp logaddexp2
    logical_and logical_not logical_or logical_xor logit lt
    masked_fill maximum minimum mish modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1
    mul mvlgamma nan_to_num ndtri ne neg nextafter polygamma positive pow
    rad2deg reciprocal relu relu6 remainder round rsqrt rsub
    scaled_modified_bessel_k0 scaled_modified_bessel_k1 selu sgn
    shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
    shifted_chebyshev_polynomial_w sigmoid sign signbit silu sin sinc sinh softplus softshrink spherical_bessel_j0
    sqrt square sub tan tanh threshold true_divide trunc where xlog1py xlogy zeta
    __lshift__ __rshift__ __xor__
""".split()

# Tagged but excluded: functions of two tensors or of dimensions, random, not elementwise, or called by autograd only.
NOT_TAKEN = frozenset(
    "max min rrelu equal _conj_physical gelu_backward logit_backward native_dropout_backward sigmoid_backward "
    "silu_backward tanh_backward threshold_backward".split()
)

# Aliases in torch of some of them.
ALIASES = """
    absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh divide expit fix gammainc gammaincc gammaln greater
    greater_equal less less_equal multigammaln multiply ndtr negative not_equal psi subtract
""".split()

# Composed by PyTorch from those above, so they have no tag.
COMPOSED = """
    floor_divide hardswish isclose isreal logsigmoid softsign tanhshrink fake_quantize_per_tensor_affine
    zeros_like ones_like full_like empty_like
""".split()

OPERATORS = """
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __floordiv__
    __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __neg__ __pos__ __abs__ __invert__
    __and__ __rand__ __or__ __ror__ __rxor__ __rlshift__ __rrshift__ __gt__ __lt__ __ge__ __le__ __eq__ __ne__
""".split()

# Their in-place forms have a gradient (zeros); the others have none.
COMPARISONS = frozenset("eq ne lt le gt ge greater greater_equal less less_equal not_equal".split())

# Operators that write to their left side, and the equivalent out-of-place function.
ASSIGNMENTS = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__idiv__": "div",
    "__itruediv__": "div",
    "__ifloordiv__": "floor_divide",
    "__imod__": "remainder",
    "__ipow__": "pow",
    "__iand__": "bitwise_and",
    "__ior__": "bitwise_or",
    "__ixor__": "bitwise_xor",
    "__ilshift__": "bitwise_left_shift",
    "__irshift__": "bitwise_right_shift",
}

# The same values in another dtype, memory order or graph.
CONVERSIONS = """
    float double half bfloat16 long int short char byte bool to type type_as contiguous detach data straight_through
""".split()

ELEMENTWISE = [*TAGGED, *ALIASES, *COMPOSED, *OPERATORS, *ASSIGNMENTS, *CONVERSIONS]

RESHAPES = frozenset({"reshape", "view", "flatten", "unflatten"})
