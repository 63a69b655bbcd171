"""`python -m chexnet_deploy`: the command line without the installed script."""

from chexnet_deploy.cli import main

main()
