"""`python -m codetr.papers`"""

import sys

from codetr.papers import main

if __name__ == "__main__":
    sys.exit(main())
