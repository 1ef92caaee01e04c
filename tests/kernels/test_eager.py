from contract import OpsContract


class TestEager(OpsContract):
    backend = "eager"
