"""Left empty on purpose: with an editable install, the suite of another repository's
`pytest --moe-golden` lies below this file, and whatever stood here would act on that run.
What our own tests need is in tests/conftest.py.
"""
