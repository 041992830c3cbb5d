// Starts the search of pages that are opened from a folder. Browsers start no worker from file://,
// so its script runs in a hidden frame, with the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source !== inside) return;
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      // Written rather than appended: some browsers replace an empty frame once it has loaded.
      const page = inside.document;
      page.open();
      // Called inside the frame, so that its messages come from the frame.
      page.write("<script>postMessage = (data) => parent.postMessage(data, '*');</" + "script>");
      page.write(`<script src="${new URL(url, location)}"></` + "script>");
      this.ready = new Promise((done) => inside.addEventListener("load", done));
      page.close();
    }

    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.ready.then(() => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
