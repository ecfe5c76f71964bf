const by = id => document.getElementById(id), out = by('out'), said = by('said'), drop = by('drop')
let file = null, last = 0
async function show(url, options) {
  const mine = ++last
  said.textContent = 'Searching ...'
  try {
    const r = await fetch(url, options), text = await r.text()
    if (mine !== last) return
    if (r.status === 410 && file) return ask(file)
    said.textContent = r.ok ? '' : text
    if (r.ok) out.innerHTML = text
  } catch { if (mine === last) said.textContent = 'No answer: is tmpa_serve still running?' }
}
function ask(f) {
  file = f
  const most = +document.body.dataset.most
  if (f.size > most) {
    last++  // what is on its way no longer counts
    said.textContent = `${f.name} has ${Math.ceil(f.size/2**20)} MB, more than ${most/2**20}: choose a smaller picture`
    return
  }
  const q = new URLSearchParams({ modality: by('modality').value, cam: by('cam').value })
  show('ask?' + q, { method: 'POST', body: f, headers: { 'content-type': 'application/octet-stream' } })
}
function again(page) {
  const s = out.querySelector('[data-query]')
  if (s) show('hits?' + new URLSearchParams({ q: s.dataset.query, page, cam: by('cam').value }))
}
by('form').addEventListener('submit', e => e.preventDefault())
by('file').addEventListener('change', e => { if (e.target.files[0]) ask(e.target.files[0]); e.target.value = '' })
by('modality').addEventListener('change', () => { if (file) ask(file) })
by('cam').addEventListener('change', () => again(1))
for (const name of ['dragover', 'dragleave', 'drop']) document.addEventListener(name, e => {
  e.preventDefault()
  drop.classList.toggle('over', name === 'dragover')
  if (name === 'drop' && e.dataTransfer.files[0]) ask(e.dataTransfer.files[0])
})
document.addEventListener('paste', e => { const f = e.clipboardData.files[0]; if (f) ask(f) })
out.addEventListener('click', e => {
  const like = e.target.closest('[data-like]'), page = e.target.closest('[data-page]')
  if (page) again(page.dataset.page)
  if (like) {
    file = null
    show(`like/${like.dataset.like}?` + new URLSearchParams({ cam: by('cam').value }), { method: 'POST' })
  }
  if (like || page) scrollTo(0, 0)
})
