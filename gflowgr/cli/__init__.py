"""The ``gflowgr`` command (:mod:`gflowgr.cli.main`): one module per subcommand."""
