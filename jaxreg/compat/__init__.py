"""Names and signatures of other libraries, made of this one: change an import, and nothing else.

`jaxreg.compat.optax` has optax's gradient clips, ``add_decayed_weights``, ``global_norm``,
``smooth_labels`` and ``keep_params_nonnegative``. Each module is imported by its own name::

    from jaxreg.compat.optax import clip_by_global_norm
"""
