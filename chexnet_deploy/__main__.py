"""`python -m chexnet_deploy`."""

from chexnet_deploy.cli.main import main

main()
