"""Headless Chromium for tests, driven over its DevTools pipe: nothing to install beside the browser, no port to find free."""
import base64, fcntl, json, os, select, shutil, subprocess, sys, tempfile, time

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --disable-background-networking --disable-component-update '
         '--disable-sync --disable-extensions --remote-debugging-pipe').split()
OFFLINE = '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'
START = 'import os, sys; r,w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])'  # the pipe's numbers are fixed


def find_browser():
    "Path of the browser that `TMPA_BROWSER` names, else of the Chromium or Chrome on the path, else None."
    return next(filter(None, map(shutil.which, [os.environ.get('TMPA_BROWSER', ''), *NAMES])), None)


class Browser:
    "One tab: `open` a page, evaluate `js` in it, `call` any DevTools method. `events` holds what the browser reported since the page was opened."
    def __init__(self, path, timeout=600):
        self.timeout,self.sent,self.buffer,self.events,self.session = timeout,0,b'',[],None
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (commands,self.to),(self.back,replies) = os.pipe(),os.pipe()
        high = [fcntl.fcntl(o, fcntl.F_DUPFD, 10) for o in (commands, replies)]
        self.process = subprocess.Popen([sys.executable, '-c', START, *map(str, high), path, *FLAGS, OFFLINE, f'--user-data-dir={self.profile.name}', 'about:blank'],
                                        pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for o in (commands, replies, *high): os.close(o)
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self.call(f'{domain}.enable')
        self.call('Page.setLifecycleEventsEnabled', enabled=True)

    def __enter__(self): return self
    def __exit__(self, *_):
        os.close(self.to)                                    # the browser ends with its pipe
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        os.close(self.back)
        self.profile.cleanup()

    def read(self, until):
        "The next message."
        while b'\0' not in self.buffer:
            if not select.select([self.back], [], [], max(0, until - time.monotonic()))[0]: raise TimeoutError(f'no answer from the browser in {self.timeout} s')
            got = os.read(self.back, 1 << 20)
            if not got: raise RuntimeError(f'the browser ended with code {self.process.wait(10)}')
            self.buffer += got
        message,_,self.buffer = self.buffer.partition(b'\0')
        return json.loads(message)

    def call(self, method, **params):
        self.sent += 1
        message = dict(id=self.sent, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        os.write(self.to, json.dumps(message).encode() + b'\0')
        until = time.monotonic() + self.timeout
        while (got := self.read(until)).get('id') != self.sent: self.events.append(got)
        if 'error' in got: raise RuntimeError(f'{method}: {got["error"]["message"]}')
        return got['result']

    def open(self, url, width=1280, height=900):
        "Load a page in a window of this size, a phone's where it is narrow."
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.events.clear()
        loader = self.call('Page.navigate', url=url)['loaderId']
        def loaded(o): return o.get('method') == 'Page.lifecycleEvent' and (o['params']['loaderId'], o['params']['name']) == (loader, 'load')
        until = time.monotonic() + self.timeout
        while not any(map(loaded, self.events)): self.events.append(self.read(until))

    def js(self, source):
        "Value of an expression in the page; a promise is awaited."
        got = self.call('Runtime.evaluate', expression=source, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in got: raise RuntimeError(got['exceptionDetails'].get('exception', {}).get('description') or got['exceptionDetails']['text'])
        return got['result'].get('value')

    def screenshot(self, path, whole=False):
        "PNG of the window, or of the whole page."
        clip = {}
        if whole:
            box = self.call('Page.getLayoutMetrics')['cssContentSize']
            clip = dict(captureBeyondViewport=True, clip=dict(x=0, y=0, width=box['width'], height=box['height'], scale=1))
        with open(path, 'wb') as f: f.write(base64.b64decode(self.call('Page.captureScreenshot', **clip)['data']))
