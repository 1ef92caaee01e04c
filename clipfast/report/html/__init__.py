"""The HTML report: one page that needs no network, from what the analyses found.

``content.py`` says what a page holds, ``pictures.py`` makes its images, ``charts.py`` its figures, ``page.py`` puts
all into ``page.html.jinja`` with ``page.css`` and ``page.js``. Needs jinja2 (``pip install 'clipfast[report]'``).
"""
