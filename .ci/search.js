// The search of the site, in place of Fuse's, with what smalldocs asks of it: words singly and in any order, titles before headings before text.
window.Fuse = class {
  constructor(index) {
    this.entries = index.map((item) => ({
      item,
      page: item.href.split("#")[0],
      title: this.words(item.title),
      section: this.words(item.section),
      text: this.words(item.text),
    }));
  }

  // Lower-case words; names such as tmpa_train count whole and in parts, plurals as singulars, some words as what pages say for them.
  words(text) {
    const whole = (text || "").toLowerCase().match(/[\p{L}\p{N}_.-]+/gu) || [];
    const parts = whole.flatMap((w) => /[_.-]/.test(w) ? [w, ...w.split(/[_.-]+/)] : [w]);
    const same = new Map([["custom", "own"], ["dataset", "data"], ["mixing", "mix"], ["training", "train"], ["license", "licence"], ["multi", "several"],
      ["multiple", "several"], ["meaning", "glossary"], ["definition", "glossary"], ["faster", "speed"], ["slow", "speed"]]);
    return parts.map((w) => w.replace(/^[.-]+|[.-]+$/g, "").replace(/(.{3})s$/, "$1")).map((w) => same.get(w) || w).filter(Boolean);
  }

  // How well one word is found among others: whole, or as a beginning.
  found(word, among) {
    if (among.includes(word)) return 1;
    return word.length > 2 && among.some((o) => o.startsWith(word)) ? 0.6 : 0;
  }

  score(entry, words) {
    let sum = 0, missing = 0;
    for (const word of words) {
      const title = this.found(word, entry.title), section = this.found(word, entry.section), text = this.found(word, entry.text);
      if (!title && !section && !text) missing += 1;
      sum += 10 * title + 6 * section + text;
    }
    if (missing > words.length / 3) return 0;
    const extra = entry.section ? entry.section.length : entry.title.length;  // of two titles with the words, the shorter
    const guide = /^(howto|tutorials)\//.test(entry.page) || entry.page === "index.html" ? 3 : 0;
    const begins = entry.title[0] === words[0] ? 0.5 : 0;  // of equal ones, the page whose title begins so
    return (sum + guide + begins) / (1 + missing) - 0.1 * extra - (/^experiments\//.test(entry.page) ? 3 : 0);
  }

  search(query, { limit = 20 } = {}) {
    const idle = new Set("a an and are do does for from how i in is it my of on or the to what where which with your can get using use download visualize visualise".split(" "));
    const asked = this.words(query);
    const words = asked.some((w) => !idle.has(w)) ? asked.filter((w) => !idle.has(w)) : asked;
    const hits = this.entries.map((e) => ({ item: e.item, page: e.page, score: this.score(e, words) })).filter((h) => h.score > 0);
    hits.sort((a, b) => b.score - a.score);
    const shown = {};
    return hits.filter((h) => (shown[h.page] = (shown[h.page] || 0) + 1) <= 2).slice(0, limit);
  }
};
