/* The search runs in a Worker, which browsers refuse to pages that are opened from disk. There a hidden frame does its work:
   the same script in a window of its own, with the same messages. */
"use strict";

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve) => {
        const start = () => {
          const scope = this.frame.contentWindow;
          // What a worker posts goes to whoever made it, not to its own window.
          scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = scope.document.createElement("script");
          script.src = url;
          script.onload = () => resolve(scope);
          scope.document.body.append(script);
        };
        this.frame.onload = start;
      });
      (document.body ?? document.documentElement).append(this.frame);
    }

    postMessage(data) {
      this.ready.then((scope) => scope.dispatchEvent(new scope.MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
