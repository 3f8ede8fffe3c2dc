"""Every preset of the library by name; a new one takes part in all tests that use this table."""

from orthonet import reparametrizers

PRESETS = {
    name.removesuffix("_ORTHO_PARAMS"): getattr(reparametrizers, name)
    for name in reparametrizers.__all__
    if name.endswith("_ORTHO_PARAMS")
}

DISTINCT = {
    name: preset
    for i, (name, preset) in enumerate(PRESETS.items())
    if preset not in list(PRESETS.values())[:i]
}
"""Those that are not another name of one before."""
