"""Compression of trained models.

From Python 3.14 the standard library owns the name `compression` (PEP 784). When this folder is
found first on `sys.path` under its bare name, as `python -m` from the repository root makes it,
it extends its path so that the standard package's modules are found as well.
"""

if __name__ == "compression":
    from pkgutil import extend_path

    __path__ = extend_path(__path__, __name__)
