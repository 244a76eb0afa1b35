// JSON-RPC 2.0 over fetch.

export const NOT_SIGNED_IN = -32001;
export const CONFLICT = -32004;
export const PASSWORD_CHANGE_NEEDED = -32006;
const UNAVAILABLE = -32010;
const RETRIES = [500, 1000, 2000, 4000]; // milliseconds
const READS = /\.(get[A-Za-z]*|bootstrap)$/;

export class ApiError extends Error {
  constructor(code, message, data) {
    super(message);
    this.code = code;
    this.data = data;
  }
}

let lastId = 0;

// The result of a call. While the server restarts, calls that only read are tried again.
export async function call(method, params = {}) {
  for (const pause of READS.test(method) ? RETRIES : []) {
    try {
      return await once(method, params);
    } catch (error) {
      if (error.code !== UNAVAILABLE) throw error;
    }
    await new Promise((resolve) => { setTimeout(resolve, pause); });
  }
  return once(method, params);
}

async function once(method, params) {
  let answer;
  try {
    lastId += 1;
    const response = await fetch("/api", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ jsonrpc: "2.0", id: lastId, method, params }),
    });
    answer = await response.json();
  } catch {
    throw new ApiError(UNAVAILABLE, "the server does not answer, please try again");
  }
  if (answer.error) throw new ApiError(answer.error.code, answer.error.message, answer.error.data);
  return answer.result;
}
