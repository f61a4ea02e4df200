"use strict";
const address = new URLSearchParams(location.search);  // the view, and in it the token
const token = address.get("token");
address.delete("token");
const ask = (query) => fetch(`/api/view?${query}`, { headers: { "x-ctxlab-token": token }, cache: "no-store" });
let first = ask(address);  // asked while the browser still reads the rest of the page
