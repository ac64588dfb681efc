"""Where tests find a browser to drive."""

import shutil

NO_CHROMIUM = "no Chromium to drive (Debian's package chromium, and playwright of the package index)"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
