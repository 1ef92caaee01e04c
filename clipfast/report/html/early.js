// Before anything is drawn: the theme chosen last time, and that scripts run at all.
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  try {
    const theme = localStorage.getItem("clipfast-theme");
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  } catch { /* no storage for this page: the system's theme */ }
})();
