import sys

from tgazsr_utils.commands import main

sys.exit(main())
