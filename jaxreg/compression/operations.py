"""The operations of a traced function that are followed, by their names."""

ELEMENTWISE = {
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh"),
    *("cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "div"),
    *("eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
    *("is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg"),
    *("nextafter", "not", "or", "pow", "real", "reduce_precision", "rem", "round", "rsqrt"),
    *("select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh"),
    *("xor", "shift_left", "shift_right_arithmetic", "shift_right_logical"),
}
# Each of them only gives an array another shape, or its numbers another dtype.
RESHAPES = (
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"),
    *("convert_element_type", "copy", "stop_gradient"),
)
WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window")
PRODUCTS = ("dot_general", "conv_general_dilated")
POSITIONAL = ("concatenate", "pad", "slice", "rev", "cumsum", "cumprod", "cummax")
SUMS = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("argmax", "argmin"),
)
# What each of them computes in float32 is what it computes in fewer bits, but for rounding.
ANY_PRECISION = {
    *(ELEMENTWISE - {"nextafter"}),
    *(*RESHAPES, *PRODUCTS, *POSITIONAL, *SUMS, "split", "gather", "iota"),
    *("reduce_window_max", "reduce_window_min", "reduce_window_sum"),
}
