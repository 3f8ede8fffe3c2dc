"""Every preset of the library by name; a new one takes part in all tests that use this table."""

from orthonet import reparametrizers

PRESETS = {
    name.removesuffix("_ORTHO_PARAMS"): getattr(reparametrizers, name)
    for name in reparametrizers.__all__
    if name.endswith("_ORTHO_PARAMS")
}
