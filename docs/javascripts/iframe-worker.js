/* Pages that are opened from the disk may start no worker; search then runs in a hidden frame of the page instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inside = frame.contentWindow
      let waiting = []
      this.postMessage = (data) => {
        if (waiting) waiting.push(data)
        else inside.dispatchEvent(new inside.MessageEvent("message", { data }))
      }
      this.terminate = () => frame.remove()
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = () => {} // only searches in other languages ask for more
      const script = inside.document.createElement("script")
      script.src = url
      script.onload = () => {
        const messages = waiting
        waiting = null
        messages.forEach((data) => this.postMessage(data))
      }
      inside.document.body.appendChild(script)
    }
  }
}
