// The colours that were chosen here before, set before anything is painted; else the system's.
try {
  const theme = localStorage.getItem("nanochat.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing: the system's colours.
}
